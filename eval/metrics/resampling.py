"""How far the scores of two sets of counts move by chance alone: both sets divided or drawn again.

Imports only NumPy and SciPy. Counts are `[K]`; everything is a pure function of counts, rule and seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from eval.metrics.bin_tests import exact_test, needs_exact, z_statistic

# Replicates for few bins; for many, as many as keep the work at so many draws of a bin. The floor needs fewer.
_MOST_REPLICATES, _MOST_FLOOR_DRAWS, _DRAWS = 1000, 499, 1_000_000
# NumPy draws hypergeometric numbers from no larger populations.
_HYPERGEOMETRIC = 1_000_000_000
# By which equal divergences may differ.
_ROUNDING = 1e-12
# Stands for 0 in logarithms that are multiplied by 0.
_TINY = np.finfo(np.float64).tiny
# Beyond this |z| a difference is taken as it is: there is nothing to shrink, and z is no longer of variance 1.
_CERTAIN = 5.0
# Differences that are tried, in standard errors; the iterations of EM; the share of bins that starts without one.
_GRID, _ITERATIONS, _NO_DIFFERENCE = np.linspace(-6, 6, 31), 100, 0.9


@dataclass(frozen=True)
class Floor:
    """The JS divergence (nats) that two sets of one distribution show: mean, 95 % quantile, p-value of the observed."""

    mean: float
    quantile: float
    p_value: float


@dataclass(frozen=True)
class Intervals:
    """95 % intervals (low, high) of NDB / K and JS (nats) when both sets are drawn anew at their sizes."""

    ndb_over_k: tuple[float, float]
    js: tuple[float, float]
    replicates: int


def replicates_for(bins: int) -> int:
    """1000 up to 1000 bins, fewer above, so that 10,000 bins are done within a second."""
    return min(_MOST_REPLICATES, max(100, _DRAWS // bins))


def js_of_counts(reference: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """JS divergence (nats) `[...]` of counts `[..., K]` (see `eval.metrics.ndb.js_divergence`)."""
    p = reference / reference.sum(-1, keepdims=True)
    q = samples / samples.sum(-1, keepdims=True)
    middle = np.maximum((p + q) / 2, _TINY)
    terms = p * np.log(np.maximum(p, _TINY) / middle) + q * np.log(np.maximum(q, _TINY) / middle)
    # Rounding may leave -1e-17 for equal distributions, and a divergence is never negative.
    return np.maximum(terms.sum(-1) / 2, 0.0)


def js_floor(reference: np.ndarray, samples: np.ndarray, seed: int) -> Floor:
    """What the JS divergence is where both sets come from one distribution, given the totals of the bins.

    Given its totals, such a pair of sets is a random division of all samples into two parts of their sizes: the counts
    are multivariate hypergeometric, exactly, however sparse the bins. (Multinomial draws from the pooled proportions
    would miss the bins that neither set has hit, and repeat those with a sample or two.) The mean is about
    (K' - 1) / 8 (1 / n1 + 1 / n2) for K' bins that are not empty, the first term of the expansion of JS as chi-square,
    and larger where counts are small. The p-value is (1 + draws as large as the observed) / (1 + draws), never zero.
    """
    draws = min(_MOST_FLOOR_DRAWS, replicates_for(len(reference)))
    simulated, observed = _divided(reference, samples, draws, seed), float(js_of_counts(reference, samples))
    exceeding = np.count_nonzero(simulated >= observed - _ROUNDING)
    return Floor(float(simulated.mean()), float(np.quantile(simulated, 0.95)), float((1 + exceeding) / (1 + draws)))


def js_limit(reference: np.ndarray, samples: np.ndarray, level: float, seed: int) -> float:
    """A JS (nats) that is exceeded at a rate of at most `level` where both sets come from one distribution.

    The largest of ceil(1 / level) - 1 random divisions of all samples: the observed one is as likely as any other to
    be the largest of all (Barnard 1963), so the rate holds whatever the counts.
    """
    return float(_divided(reference, samples, math.ceil(1 / level) - 1, seed).max()) + _ROUNDING


def _divided(reference: np.ndarray, samples: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """JS `[draws]` of random divisions of all samples into parts of the two sizes."""
    rng = np.random.default_rng([seed, 0])
    total = reference + samples
    n, small = int(total.sum()), min(int(reference.sum()), int(samples.sum()))
    found, step = [], max(1, _DRAWS // len(total))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        if n < _HYPERGEOMETRIC:
            part = rng.multivariate_hypergeometric(total, small, rows, method="marginals")
        elif small < n // 1000:  # so few of all that replacing them changes nothing
            part = np.minimum(rng.multinomial(small, total / n, rows), total)
        else:  # a million or more: that their number varies by 0.1 % changes nothing
            part = rng.binomial(total, small / n, (rows, len(total)))
        found.append(js_of_counts(total - part, part))
    return np.concatenate(found)


def intervals(reference: np.ndarray, samples: np.ndarray, *, level: float, z_threshold: float, seed: int) -> Intervals:
    """The observed scores, with the spread about their mean of a parametric bootstrap from shrunken differences.

    Observed differences are true ones plus noise. Drawn from again as they are they would get a second helping of
    it: where nothing differs, z of the replicates has the variance 2, and 17 % of the bins pass |z| > 1.96. So the
    replicates come from `shrunken_z`: the pooled proportions stay, and the difference of a bin is its shrunken z
    times its standard error. A replicate's NDB is counted by the same tests and rule.

    A score is an unbiased estimate of its own mean, so only the spread is taken from the replicates: the limits are
    observed + (2.5 % and 97.5 % quantile of the replicates - their mean), not below 0 and not above the maximum. They
    cover the mean of the score at about the nominal rate (see `tests/benchmarks/bench_ndb_intervals.py`).
    """
    z = z_statistic(reference, samples)
    n_reference, n_samples = int(reference.sum()), int(samples.sum())
    n = n_reference + n_samples
    pooled = (reference + samples) / n
    difference = shrunken_z(z) * np.sqrt(pooled * (1 - pooled) * (1 / n_reference + 1 / n_samples))
    rng, replicates = np.random.default_rng([seed, 1]), replicates_for(len(z))
    first, second = (
        rng.multinomial(size, _distribution(pooled + share * difference), replicates)
        for size, share in ((n_reference, -n_samples / n), (n_samples, n_reference / n))
    )
    share_flagged = flagged_bins(first, second, level, z_threshold).mean(1)
    observed = flagged_bins(reference[None], samples[None], level, z_threshold).mean()
    js = js_of_counts(reference, samples)
    return Intervals(
        ndb_over_k=_around(float(observed), share_flagged, 1.0),
        js=_around(float(js), js_of_counts(first, second), float(np.log(2))),
        replicates=replicates,
    )


def flagged_bins(reference: np.ndarray, samples: np.ndarray, level: float, z_threshold: float) -> np.ndarray:
    """Which bins `[B, K]` the rule flags in each of B pairs of counts `[B, K]` of the same two sizes."""
    flagged = np.abs(z_statistic(reference, samples)) > z_threshold
    exact = needs_exact(reference, samples)
    sizes = int(reference[0].sum()), int(samples[0].sum())
    flagged[exact] = exact_test(reference[exact], samples[exact], *sizes, level)[0] < level
    return flagged


def _around(observed: float, replicates: np.ndarray, most: float) -> tuple[float, float]:
    low, high = observed + np.quantile(replicates, (0.025, 0.975)) - replicates.mean()
    # The quantiles of a skewed score may lie on one side of its mean; the observed score stays inside.
    return max(0.0, min(float(low), observed)), min(most, max(float(high), observed))


def shrunken_z(z: np.ndarray) -> np.ndarray:
    """True differences `[K]` in standard errors, such that z drawn about them spread as the observed z do.

    Each z is taken as N(delta, 1), and the distribution of delta over bins is the mixture on a grid that makes all
    z likeliest (Kiefer and Wolfowitz 1956), found by EM from a start where nine bins in ten do not differ. The bins
    get its quantiles in the order of their z (Shen and Louis 1998): unlike posterior means, which spread too little,
    and z itself, which spread too much, these reproduce tails and second moment of the observed z. A common factor
    for all z, by the second moment alone, would let one collapsed mode undo the shrinkage of all others.
    """
    delta = z.astype(np.float64).copy()
    uncertain = np.flatnonzero(np.abs(z) <= _CERTAIN)
    if not uncertain.size:
        return delta
    inside = z[uncertain]
    likelihood = np.exp(-0.5 * np.square(inside[:, None] - _GRID))
    weights = np.full(len(_GRID), (1 - _NO_DIFFERENCE) / len(_GRID))
    weights[len(_GRID) // 2] += _NO_DIFFERENCE
    for _ in range(_ITERATIONS):
        weights *= likelihood.T @ (1 / (likelihood @ weights)) / len(inside)
    ranks = (np.arange(len(inside)) + 0.5) / len(inside)
    places = np.minimum(np.searchsorted(np.cumsum(weights), ranks), len(_GRID) - 1)
    delta[uncertain[np.argsort(inside, kind="stable")]] = _GRID[places]
    return delta


def _distribution(values: np.ndarray) -> np.ndarray:
    """Values as proportions: a shrunken difference may leave a small bin with less than nothing."""
    kept = np.maximum(values, 0.0)
    return kept / kept.sum()
