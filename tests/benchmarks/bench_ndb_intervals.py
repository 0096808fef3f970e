"""How often the 95 % intervals of NDB / K and JS cover the true mean of the score, and what they would be otherwise.

Per situation the truth is known: the mean over 4000 pairs of sets. "plain" draws again from the observed proportions
and takes percentiles; "factor" first shrinks all differences by one factor s, s^2 = max(0, 1 - 1 / mean(z^2)), and
takes percentiles; "ours" is `eval.metrics.resampling.intervals`. Coverage has a standard error of
sqrt(0.05 * 0.95 / pairs), 1.3 % with 300 pairs (the default; the argument). `sd` is the score's true standard
deviation, the others the mean of what each method's interval says (width / 3.92).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from scipy import stats

from eval.metrics.bin_tests import z_statistic
from eval.metrics.resampling import flagged_bins, intervals, js_of_counts

Z = float(stats.norm.isf(0.025))
RULE = {"level": 0.05, "z_threshold": Z}


def situations(bins: int, n1: int, n2: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.full(bins, 5.0))
    error = np.sqrt(p * (1 - p) * (1 / n1 + 1 / n2))
    few, tenth = max(1, bins // 10), rng.permutation(bins)
    moderate, one, many = p.copy(), p.copy(), p.copy()
    moderate[tenth[:few]] += rng.choice([-1, 1], few) * 3 * error[tenth[:few]]
    one[np.argsort(-p)[bins // 20]] = 0
    many[tenth[:few]] = 0
    changed = {
        "no difference": p,
        "10 % of the bins by 3 se": np.maximum(moderate, 0),
        "one mode collapsed": one,
        "10 % of the modes collapsed": many,
        "all bins by 30 %": p * np.exp(0.3 * rng.standard_normal(bins)),
    }
    return {name: (p, q / q.sum()) for name, q in changed.items()}


def percentiles(shrink: bool) -> Callable[[np.ndarray, np.ndarray], dict[str, tuple[float, float]]]:
    rng = np.random.default_rng(2)

    def limits(a: np.ndarray, b: np.ndarray) -> dict[str, tuple[float, float]]:
        s = np.sqrt(max(0.0, 1 - 1 / np.mean(np.square(z_statistic(a, b))))) if shrink else 1.0
        pooled = (a + b) / (a.sum() + b.sum())
        first, second = (rng.multinomial(c.sum(), pooled + s * (c / c.sum() - pooled), 1000) for c in (a, b))
        scores = {"ndb_over_k": flagged_bins(first, second, **RULE).mean(1), "js": js_of_counts(first, second)}
        return {name: tuple(np.quantile(values, [0.025, 0.975])) for name, values in scores.items()}

    return limits


def main(pairs: int = 300) -> None:
    methods = {
        "plain": percentiles(shrink=False),
        "factor": percentiles(shrink=True),
        "ours": lambda a, b: vars(intervals(a, b, **RULE, seed=0)),
    }
    heads = [f"{name:>7}" for name in methods]
    for bins, n1, n2 in ((100, 45_000, 10_000), (100, 1500, 700), (10, 5000, 2000)):
        print(f"K = {bins}, {n1:,} and {n2:,} samples, p < 0.05, {pairs} pairs: coverage; sd of the score and as told")
        print(f"{'':<28}{'score':<7}{'mean':>8}{''.join(heads)} |{'sd':>9}{''.join(' ' + h for h in heads)}")
        for situation, (p, q) in situations(bins, n1, n2).items():
            rng = np.random.default_rng(1)
            a, b = rng.multinomial(n1, p, 4000), rng.multinomial(n2, q, 4000)
            truth = {"ndb_over_k": flagged_bins(a, b, **RULE).mean(1), "js": js_of_counts(a, b)}
            found = {name: [method(x, y) for x, y in zip(a[:pairs], b[:pairs])] for name, method in methods.items()}
            for score, values in truth.items():
                edges = {name: np.array([each[score] for each in found[name]]) for name in methods}
                mean = values.mean()
                covered = [f"{np.mean((e[:, 0] <= mean) & (mean <= e[:, 1])):7.3f}" for e in edges.values()]
                widths = [f"{np.mean(e[:, 1] - e[:, 0]) / 3.92:8.5f}" for e in edges.values()]
                label = "NDB/K" if score == "ndb_over_k" else "JS"
                told = f"{label:<7}{mean:>8.4f}{''.join(covered)} |{values.std():>9.5f}{''.join(widths)}"
                print(f"{situation:<28}{told}", flush=True)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
