"""Whether a candidate's scores are worse than the champion's, beyond what chance does to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.metrics import ndb
from eval.metrics.ndb import NDBResult

# Of a 95 % interval; a champion's equal is refused by a score in one case of forty.
_Z = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Contest:
    """One score of candidate and champion: what each has, the rule, and whether the candidate's is worse by it.

    `difference` is candidate - champion, and `text` says what was found in a sentence.
    """

    score: str
    candidate: str
    champion: str
    difference: float
    worse: bool
    text: str


def contest_ndb(candidate: NDBResult, champion: NDBResult) -> Contest:
    """By bins after Holm's correction, both against the same reference.

    The candidate is worse where more of its bins differ from the reference, and where it also differs from the
    champion itself: Holm's correction of the two-proportion tests between the two sets of samples (at the same
    level) finds more bins in which the candidate's share is further from the reference's than bins in which it is
    nearer. Without the second condition a bin at the edge of significance would decide. Two sets of one distribution
    are told apart in at most `level` of all cases.
    """
    direct = ndb.score(champion.sample_counts, candidate.sample_counts, significance=candidate.level)
    reference = candidate.reference_proportions
    further = np.abs(candidate.sample_proportions - reference) - np.abs(champion.sample_proportions - reference)
    apart = direct.p_holm < candidate.level
    lost, gained = np.flatnonzero(apart & (further > 0)), np.flatnonzero(apart & (further < 0))
    more = candidate.ndb_holm - champion.ndb_holm
    worse = more > 0 and len(lost) > len(gained)
    order = lost[np.argsort(-further[lost])][:5]
    shares = ", ".join(
        f"bin {k} {100 * candidate.sample_proportions[k]:.1f} % for {100 * champion.sample_proportions[k]:.1f} %"
        f" (data {100 * reference[k]:.1f} %)"
        for k in order
    )
    text = f"NDB (Holm) is {more} above the champion's, {len(lost)} bins are further from the data"
    ours, theirs = (f"{each.ndb_holm} of {each.bins}" for each in (candidate, champion))
    return Contest(
        "NDB (Holm)",
        ours,
        theirs,
        more,
        worse,
        text + (f": {shares}" if shares else ""),
    )


def contest_js(candidate: NDBResult, champion: NDBResult) -> Contest:
    """By the Jensen-Shannon divergence (nats), against both intervals.

    The lower 95 % limit of a difference c - h of two estimates with the limits (c1, c2) and (h1, h2) is
    c - h - sqrt((c - c1)² + (h2 - h)²) (Zou and Donner, Statistics in Medicine 27, 2008, eq. 6); the candidate is
    worse where it is above 0. Both share the reference, whose chance moves both the same way: the rule is cautious.
    """
    (low, _), (_, high) = candidate.intervals.js, champion.intervals.js
    difference = candidate.js - champion.js
    reach = math.hypot(candidate.js - low, high - champion.js)
    ours, theirs = (f"{r.js:.4f} ({r.intervals.js[0]:.4f}–{r.intervals.js[1]:.4f})" for r in (candidate, champion))
    return Contest(
        "JS (nats)",
        ours,
        theirs,
        difference,
        difference > reach,
        f"JS is {difference:+.4f} nats from the champion's, chance reaches {reach:.4f}",
    )


def contest_means(
    score: str,
    candidate: tuple[float, float],
    champion: tuple[float, float],
    *,
    higher_is_better: bool = True,
    margin: float = 0.0,
) -> Contest:
    """By two means with their standard errors, taken as independent: worse by more than margin + 1.96 √(se1² + se2²).

    The margin is that of a test of non-inferiority: what the candidate may lose in truth.
    """
    reach = margin + _Z * math.hypot(candidate[1], champion[1])
    return _contest(score, candidate, champion, candidate[0] - champion[0], reach, higher_is_better, "")


def contest_paired(
    score: str,
    candidate: np.ndarray,
    champion: np.ndarray,
    *,
    higher_is_better: bool = True,
    margin: float = 0.0,
) -> Contest:
    """By values `[n]` of the same samples: worse by more than margin + 1.96 standard errors of the differences' mean.

    The error is that of the held-out samples alone; what another seed of the same training would change is no part of
    it, and many samples tell small differences apart: that is what the margin is for.

    Raises:
        ValueError: fewer than two samples, or not the same number.
    """
    candidate, champion = (np.asarray(values, np.float64) for values in (candidate, champion))
    if candidate.shape != champion.shape or candidate.ndim != 1 or len(candidate) < 2:
        raise ValueError(f"two vectors of one length, 2 or more, are needed, got {candidate.shape}, {champion.shape}")

    def error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / math.sqrt(len(values)))

    difference = candidate - champion
    (a, b) = ((float(values.mean()), error(values)) for values in (candidate, champion))
    note = f" over {len(difference):,} samples, in pairs"
    return _contest(score, a, b, float(difference.mean()), margin + _Z * error(difference), higher_is_better, note)


def _contest(
    score: str,
    candidate: tuple[float, float],
    champion: tuple[float, float],
    difference: float,
    reach: float,
    higher_is_better: bool,
    note: str,
) -> Contest:
    loss = -difference if higher_is_better else difference
    ours, theirs = (f"{mean:.4g} ± {error:.2g}" for mean, error in (candidate, champion))
    return Contest(
        score,
        ours,
        theirs,
        difference,
        loss > reach,
        f"{score} is {difference:+.4g} from the champion's, allowed are {reach:.2g}{note}",
    )
