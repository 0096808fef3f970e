"""Per-bin tests of two sets of counts, and their correction for many bins. Imports only NumPy and SciPy.

Arrays of counts are `[..., K]`; the sets are called reference (1) and samples (2). Callers have checked the counts.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

# The rule of thumb for the normal approximation of a 2 x 2 table (Cochran 1954).
MIN_EXPECTED = 5
# Probabilities that differ by rounding alone are equal.
_TOLERANCE = 1e-7
# With less than 5 expected, so many in the cell have a probability that float64 cannot hold: their p-value is 0.
_IMPOSSIBLE = 400
# Cells beyond the largest observed one that still add to its p-value.
_TAIL = 64
_TABLE_VALUES = 1 << 20


def z_statistic(reference: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The pooled two-proportion z `[..., K]` (see `eval.metrics.ndb.two_proportion_z`); 0 where its error is 0."""
    n_reference, n_samples = reference.sum(-1, keepdims=True), samples.sum(-1, keepdims=True)
    pooled = (reference + samples) / (n_reference + n_samples)
    error = np.sqrt(pooled * (1 - pooled) * (1 / n_reference + 1 / n_samples))
    difference = samples / n_samples - reference / n_reference
    return np.divide(difference, error, out=np.zeros_like(error), where=error > 0)


def needs_exact(reference: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Whether `[..., K]` a cell of the bin's 2 x 2 table (set, inside or outside) is expected to hold fewer than 5."""
    n_reference, n_samples = reference.sum(-1, keepdims=True), samples.sum(-1, keepdims=True)
    total, n = reference + samples, n_reference + n_samples
    smaller = np.minimum(n_reference, n_samples).astype(np.float64)  # whose product with a count may not fit int64
    return smaller * np.minimum(total, n - total) / n < MIN_EXPECTED


def exact_test(
    reference: np.ndarray, samples: np.ndarray, n_reference: int, n_samples: int, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fisher's exact test of each of `[m]` bins that `needs_exact` names.

    Given a bin's total, the count of either set is hypergeometric where both come from one distribution. The
    two-sided p-value adds the probabilities of all counts that are not likelier than the observed one (up to
    1e-7 of it). Bins of one total share one table.

    Returns:
        p-values `[m]`, and sizes `[m]`: the probability, given the total, of a p-value below `level`.
    """
    n = n_reference + n_samples
    few, small = (samples, n_samples) if n_samples <= n_reference else (reference, n_reference)
    total = (reference + samples).astype(np.int64)
    # Sets and sides are exchanged so that the cell with the smallest expectation is the one that is counted.
    outside = 2 * total > n
    few, total = np.where(outside, small - few, few).astype(np.int64), np.where(outside, n - total, total)
    if not total.size:
        return np.zeros(0), np.zeros(0)
    totals, row = np.unique(total, return_inverse=True)
    width = 1 + min(int(totals[-1]), int(small), min(int(few.max()), _IMPOSSIBLE) + _TAIL)
    p_values, sizes = np.empty(total.size), np.empty(total.size)
    # Sets of very different size have bins of as many totals as there are bins: tables are made in blocks.
    order, step = np.argsort(row, kind="stable"), max(1, _TABLE_VALUES // width)
    for start in range(0, len(totals), step):
        own = order[slice(*np.searchsorted(row, (start, start + step), sorter=order))]
        log_p = _hypergeometric(totals[start : start + step, None], int(small), int(n - small), width)
        table, where = _two_sided(log_p), row[own] - start
        sizes[own] = np.where(table < level, np.exp(log_p), 0.0).sum(1)[where]
        p_values[own] = np.where(few[own] < width, table[where, np.minimum(few[own], width - 1)], 0.0)
    return p_values, sizes


def _hypergeometric(total: np.ndarray, small: int, large: int, width: int) -> np.ndarray:
    """log P(x) `[T, width]` of x members of the small set among `total` [T, 1] drawn from both; -inf where none."""
    x = np.arange(width - 1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        ratio = np.log(np.maximum(total - x, 0)) + np.log(np.maximum(small - x, 0))
    ratio = ratio - np.log((x + 1) * (large - total + x + 1))
    log_p = np.concatenate([np.zeros((len(total), 1)), np.cumsum(ratio, axis=1)], axis=1)
    return log_p - logsumexp(log_p, axis=1, keepdims=True)


def _two_sided(log_p: np.ndarray) -> np.ndarray:
    """For every entry of every row, the probability of all entries that are not larger."""
    order = np.argsort(log_p, axis=1, kind="stable")
    ranked = np.take_along_axis(log_p, order, axis=1)
    added = np.cumsum(np.exp(ranked), axis=1)
    # Equal entries share the sum at the end of their group.
    with np.errstate(invalid="ignore"):  # -inf minus -inf: equal
        ends = ranked[:, 1:] - ranked[:, :-1] > _TOLERANCE
    ends = np.concatenate([ends, np.ones((len(ends), 1), bool)], axis=1)
    shared = np.minimum.accumulate(np.where(ends, added, np.inf)[:, ::-1], axis=1)[:, ::-1]
    p_values = np.empty_like(log_p)
    np.put_along_axis(p_values, order, np.minimum(shared, 1.0), axis=1)
    return p_values


def holm(p_values: np.ndarray, n_tests: int) -> np.ndarray:
    """Adjusted p-values `[K]` of Holm (1979): below a level for the bins that are flagged at that family-wise level.

    `n_tests` bins were tested; the others have the p-value 1. Holds whatever the dependence between bins.
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.maximum(n_tests - np.arange(len(order)), 1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps * p_values[order]), 1.0)
    return adjusted


def benjamini_hochberg(p_values: np.ndarray, n_tests: int) -> np.ndarray:
    """Adjusted p-values `[K]` of Benjamini and Hochberg (1995), for false-discovery rates.

    As `holm`. Proven for independent bins; the proportions of bins depend on each other through their sum alone.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * n_tests / np.minimum(np.arange(1, len(order) + 1), max(n_tests, 1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted
