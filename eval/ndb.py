"""NDB and the Jensen-Shannon divergence between two sets of bin counts. Imports only NumPy and SciPy.

Source: E. Richardson and Y. Weiss, "On GANs and GMMs", NeurIPS 2018, section 4 ("number of statistically-different
bins") and supplement section 1.1. Faults in the arguments raise `ValueError`: this module knows no other room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import xlogy

DEFAULT_SIGNIFICANCE = 0.05


def two_proportion_z(reference_counts: np.ndarray, sample_counts: np.ndarray) -> np.ndarray:
    """The pooled two-proportion z statistic of every bin.

        p = (c1 + c2) / (n1 + n2),   se = sqrt(p (1 - p) (1/n1 + 1/n2)),   z = (c2/n2 - c1/n1) / se

    Arguments are counts `[K]` of the reference (1) and of the samples (2). Returns z `[K]` float64: negative where
    the samples fall short, 0 where se is 0 (a bin that is empty in both sets, or that holds everything of both).

    Raises:
        ValueError: negative or fractional counts, different lengths, or a set without any sample.
    """
    reference, samples = _checked(reference_counts), _checked(sample_counts)
    if reference.shape != samples.shape:
        raise ValueError(f"{reference.size} reference bins but {samples.size} sample bins: use one set of bins")
    n_reference, n_samples = reference.sum(), samples.sum()
    pooled = (reference + samples) / (n_reference + n_samples)
    error = np.sqrt(pooled * (1 - pooled) * (1 / n_reference + 1 / n_samples))
    difference = samples / n_samples - reference / n_reference
    return np.divide(difference, error, out=np.zeros_like(error), where=error > 0)


def js_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The Jensen-Shannon divergence of two distributions `[K]` in nats, between 0 and ln 2.

        JS = (KL(p || m) + KL(q || m)) / 2,   m = (p + q) / 2,   with 0 log 0 = 0

    Both are normalised first, so counts do as well as proportions.

    Raises:
        ValueError: negative entries, different lengths, or nothing but zeros.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape or p.ndim != 1:
        raise ValueError(f"two vectors of one length are needed, got shapes {p.shape} and {q.shape}")
    if not (np.all(p >= 0) and np.all(q >= 0) and 0 < p.sum() < np.inf and 0 < q.sum() < np.inf):
        raise ValueError("proportions must be finite, not negative, and not all zero")
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    safe = np.where(middle > 0, middle, 1.0)
    # Rounding may leave -1e-17 for equal distributions, and a divergence is never negative.
    return max(0.0, float((xlogy(p, p / safe) + xlogy(q, q / safe)).sum() / 2))


@dataclass(frozen=True)
class NDBResult:
    """How the samples' bin proportions differ from the reference's. Arrays are `[K]`, in the order of the bins."""

    ndb: int
    ndb_over_k: float
    js: float
    bins: int
    n_reference: int
    n_samples: int
    z: np.ndarray
    p_values: np.ndarray
    flagged: np.ndarray
    reference_proportions: np.ndarray
    sample_proportions: np.ndarray
    threshold: str
    z_threshold: float
    expected_by_chance: float

    def by_evidence(self) -> np.ndarray:
        """Bin numbers `[K]`, largest |z| first."""
        return np.argsort(-np.abs(self.z), kind="stable")

    def direction(self, k: int) -> str:
        """What the samples do in bin `k`: "missing" (fewer than the reference), "over-represented" or "equal"."""
        return "missing" if self.z[k] < 0 else "over-represented" if self.z[k] > 0 else "equal"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: the scores, the rule, and every bin with its direction, strongest evidence first."""
        return {
            "ndb": self.ndb,
            "ndb_over_k": self.ndb_over_k,
            "js": self.js,
            "bins": self.bins,
            "n_reference": self.n_reference,
            "n_samples": self.n_samples,
            "threshold": self.threshold,
            "expected_by_chance": self.expected_by_chance,
            "per_bin": [
                {
                    "bin": int(k),
                    "direction": self.direction(k),
                    "flagged": bool(self.flagged[k]),
                    "z": float(self.z[k]),
                    "p_value": float(self.p_values[k]),
                    "reference_proportion": float(self.reference_proportions[k]),
                    "sample_proportion": float(self.sample_proportions[k]),
                }
                for k in self.by_evidence()
            ],
        }


def score(
    reference_counts: np.ndarray,
    sample_counts: np.ndarray,
    *,
    z_threshold: float | None = None,
    significance: float | None = None,
) -> NDBResult:
    """NDB: the number of bins whose proportions differ significantly, with the JS divergence (nats) beside it.

    A bin is flagged where |z| > `z_threshold`, or where the two-sided p-value 2 (1 - Phi(|z|)) < `significance`.
    Give one of the two; with neither, significance 0.05 (the paper's). `expected_by_chance` is the number of bins
    that the rule flags on average when both sets come from one distribution: the rule's level times the number of
    bins that are not empty in both sets (normal approximation).

    Raises:
        ValueError: both rules given, a rule out of range, or unusable counts (see `two_proportion_z`).
    """
    if z_threshold is not None and significance is not None:
        raise ValueError("give z_threshold or significance, not both")
    z = two_proportion_z(reference_counts, sample_counts)
    p_values = 2 * stats.norm.sf(np.abs(z))
    if z_threshold is not None:
        if not 0 < z_threshold < np.inf:
            raise ValueError(f"z_threshold must be positive, got {z_threshold}")
        level = 2 * float(stats.norm.sf(z_threshold))
        flagged, threshold = np.abs(z) > z_threshold, f"|z| > {z_threshold:g}"
    else:
        level = DEFAULT_SIGNIFICANCE if significance is None else significance
        if not 0 < level < 1:
            raise ValueError(f"significance must lie between 0 and 1, got {level}")
        z_threshold = float(stats.norm.isf(level / 2))
        flagged, threshold = p_values < level, f"p < {level:g} (|z| > {z_threshold:.2f})"
    reference, samples = np.asarray(reference_counts, np.int64), np.asarray(sample_counts, np.int64)
    ndb, bins = int(flagged.sum()), int(z.size)
    return NDBResult(
        ndb=ndb,
        ndb_over_k=ndb / bins,
        js=js_divergence(reference, samples),
        bins=bins,
        n_reference=int(reference.sum()),
        n_samples=int(samples.sum()),
        z=z,
        p_values=p_values,
        flagged=flagged,
        reference_proportions=reference / reference.sum(),
        sample_proportions=samples / samples.sum(),
        threshold=threshold,
        z_threshold=float(z_threshold),
        expected_by_chance=float(level * np.count_nonzero(reference + samples)),
    )


def _checked(counts: np.ndarray) -> np.ndarray:
    """Counts as float64 `[K]`."""
    values = np.asarray(counts, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"counts must be one vector with an entry per bin, got shape {values.shape}")
    if not np.all(np.isfinite(values)) or np.any(values < 0) or np.any(values != np.floor(values)):
        raise ValueError("counts must be whole numbers that are not negative")
    if values.sum() == 0:
        raise ValueError("all counts are zero: there is no sample to compare")
    return values
