"""NDB and the Jensen-Shannon divergence between two sets of bin counts. Imports only NumPy and SciPy.

Source: E. Richardson and Y. Weiss, "On GANs and GMMs", NeurIPS 2018, section 4 ("number of statistically-different
bins") and supplement section 1.1. Beyond the paper: Fisher's exact test for small bins, corrections for many bins,
and what chance alone does to both scores. Faults in the arguments raise `ValueError`: this module knows no other room.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from eval.metrics import resampling
from eval.metrics.bin_tests import benjamini_hochberg, exact_test, holm, needs_exact, z_statistic

DEFAULT_SIGNIFICANCE = 0.05
# A flagged bin with at most this share of what the reference has there is called missing.
MISSING_SHARE = 0.1


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
    return z_statistic(reference, samples)


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
    return float(resampling.js_of_counts(p, q))


@dataclass(frozen=True)
class NDBResult:
    """How the samples' bin proportions differ from the reference's. Arrays are `[K]`, in the order of the bins.

    Attributes:
        z: two-proportion z of every bin; p_values: of the test that `exact` names; flagged: by the rule.
        exact: where Fisher's exact test was used instead of z.
        p_holm, p_bh: p-values adjusted for the number of bins that are not empty in both sets; a bin is flagged at
            a family-wise error rate (Holm 1979) or false-discovery rate (Benjamini and Hochberg 1995) where its
            adjusted p-value is below it.
        level: of the rule in each bin, and of `ndb_holm` and `ndb_bh`.
        expected_by_chance: bins that the rule flags on average where both sets come from one distribution.
        reference_counts, sample_counts: as given; seed: of the simulations.
    """

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
    exact: np.ndarray
    p_holm: np.ndarray
    p_bh: np.ndarray
    level: float
    reference_counts: np.ndarray
    sample_counts: np.ndarray
    seed: int

    @cached_property
    def js_floor(self) -> resampling.Floor:
        """What JS is where both sets come from one distribution; simulated when it is first asked for."""
        return resampling.js_floor(self.reference_counts, self.sample_counts, self.seed)

    def js_limit(self, level: float) -> float:
        """A JS (nats) that two sets of one distribution exceed at a rate of at most `level` (see `resampling`)."""
        return resampling.js_limit(self.reference_counts, self.sample_counts, level, self.seed)

    @cached_property
    def intervals(self) -> resampling.Intervals:
        """95 % intervals of NDB / K and JS, from drawing both sets again; simulated when they are first asked for."""
        return resampling.intervals(
            *(self.reference_counts, self.sample_counts),
            level=self.level,
            z_threshold=self.z_threshold,
            seed=self.seed,
        )

    @property
    def ndb_holm(self) -> int:
        """Bins flagged at the family-wise error rate `level`."""
        return self.corrected(self.level)[0]

    @property
    def ndb_bh(self) -> int:
        """Bins flagged at the false-discovery rate `level`."""
        return self.corrected(self.level)[1]

    def corrected(self, level: float) -> tuple[int, int]:
        """Bins flagged at a family-wise error rate (Holm) and at a false-discovery rate (BH) of `level`."""
        return int(np.count_nonzero(self.p_holm < level)), int(np.count_nonzero(self.p_bh < level))

    def by_evidence(self) -> np.ndarray:
        """Bin numbers `[K]`, smallest p-value first, largest |z| where p-values are equal."""
        return np.lexsort((-np.abs(self.z), self.p_values))

    def direction(self, k: int) -> str:
        """How the samples differ from the reference in bin `k`.

        "equal" where the bin is not flagged; else "more", "fewer", or, where the samples' share is a tenth of the
        reference's at most, "missing".
        """
        if not self.flagged[k]:
            return "equal"
        if self.z[k] > 0:
            return "more"
        missing = self.sample_proportions[k] <= MISSING_SHARE * self.reference_proportions[k]
        return "missing" if missing else "fewer"

    def fewer(self) -> list[int]:
        """The flagged bins with fewer samples than in the reference, missing ones among them, strongest first."""
        return [int(k) for k in self.by_evidence() if self.flagged[k] and self.z[k] < 0]

    def told(self) -> str:
        """How many bins differ in which way: "1 missing, 2 with fewer samples, 4 with more"."""
        directions = [self.direction(int(k)) for k in np.flatnonzero(self.flagged)]
        words = {"missing": "missing", "fewer": "with fewer samples", "more": "with more"}
        return ", ".join(f"{n} {words[name]}" for name in words if (n := directions.count(name)))

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
            "level": self.level,
            "expected_by_chance": self.expected_by_chance,
            "ndb_holm": self.ndb_holm,
            "ndb_bh": self.ndb_bh,
            "corrected": [
                {"level": level, **dict(zip(("ndb_holm", "ndb_bh"), self.corrected(level)))}
                for level in sorted({self.level, DEFAULT_SIGNIFICANCE})
            ],
            "js_floor": asdict(self.js_floor),
            "intervals": asdict(self.intervals),
            "per_bin": [
                {
                    "bin": int(k),
                    "direction": self.direction(k),
                    "flagged": bool(self.flagged[k]),
                    "z": float(self.z[k]),
                    "p_value": float(self.p_values[k]),
                    "test": "exact" if self.exact[k] else "z",
                    "p_holm": float(self.p_holm[k]),
                    "p_bh": float(self.p_bh[k]),
                    "reference_proportion": float(self.reference_proportions[k]),
                    "sample_proportion": float(self.sample_proportions[k]),
                }
                for k in self.by_evidence()
            ],
        }


def check_rule(z_threshold: float | None, significance: float | None) -> None:
    """Refuses what `score` cannot flag bins by.

    Raises:
        ValueError: both given, or one out of range.
    """
    if z_threshold is not None and significance is not None:
        raise ValueError("give z_threshold or significance, not both")
    if z_threshold is not None and not 0 < z_threshold < np.inf:
        raise ValueError(f"z_threshold must be positive, got {z_threshold}")
    if significance is not None and not 0 < significance < 1:
        raise ValueError(f"significance must lie between 0 and 1, got {significance}")


def score(
    reference_counts: np.ndarray,
    sample_counts: np.ndarray,
    *,
    z_threshold: float | None = None,
    significance: float | None = None,
    seed: int = 0,
) -> NDBResult:
    """NDB: the number of bins whose proportions differ significantly, with the JS divergence (nats) beside it.

    A bin is flagged where |z| > `z_threshold`, or where the two-sided p-value 2 (1 - Phi(|z|)) < `significance`.
    Give one of the two; with neither, significance 0.05 (the paper's). Where fewer than 5 samples are expected inside
    or outside of a bin in either set, the p-value is that of Fisher's exact test, and the bin is flagged where it is
    below the rule's level: `significance`, or 2 (1 - Phi(`z_threshold`)).

    `expected_by_chance` adds the level for each z test (normal approximation), and for each exact test its true
    size given the bin's total, which is smaller as counts are whole numbers, and 0 for a bin empty in both sets.

    Args:
        reference_counts, sample_counts: per bin, `[K]`.
        z_threshold, significance: the rule.
        seed: fixes the simulations behind the result's `js_floor` and `intervals`.

    Raises:
        ValueError: both rules given, a rule out of range, or unusable counts (see `two_proportion_z`).
    """
    check_rule(z_threshold, significance)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    z = two_proportion_z(reference_counts, sample_counts)
    p_values = 2 * stats.norm.sf(np.abs(z))
    if z_threshold is not None:
        level = 2 * float(stats.norm.sf(z_threshold))
        flagged, threshold = np.abs(z) > z_threshold, f"|z| > {z_threshold:g}"
    else:
        level = DEFAULT_SIGNIFICANCE if significance is None else significance
        z_threshold = float(stats.norm.isf(level / 2))
        flagged, threshold = p_values < level, f"p < {level:g} (|z| > {z_threshold:.2f})"
    reference, samples = np.asarray(reference_counts, np.int64), np.asarray(sample_counts, np.int64)
    n_reference, n_samples = int(reference.sum()), int(samples.sum())
    exact, sizes = needs_exact(reference, samples), np.full(z.size, level)
    p_values[exact], sizes[exact] = exact_test(reference[exact], samples[exact], n_reference, n_samples, level)
    flagged[exact] = p_values[exact] < level
    used = int(np.count_nonzero(reference + samples))
    ndb, bins = int(flagged.sum()), int(z.size)
    return NDBResult(
        ndb=ndb,
        ndb_over_k=ndb / bins,
        js=js_divergence(reference, samples),
        bins=bins,
        n_reference=n_reference,
        n_samples=n_samples,
        z=z,
        p_values=p_values,
        flagged=flagged,
        reference_proportions=reference / n_reference,
        sample_proportions=samples / n_samples,
        threshold=threshold,
        z_threshold=float(z_threshold),
        expected_by_chance=float(sizes.sum()),
        exact=exact,
        p_holm=holm(p_values, used),
        p_bh=benjamini_hochberg(p_values, used),
        level=level,
        reference_counts=reference,
        sample_counts=samples,
        seed=seed,
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
