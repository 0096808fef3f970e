"""Judges a set of samples by fitted bins: the scores, the protocol that they hold under, and each sample's bin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.errors import UserError
from eval import ndb
from eval.bins import Bins

# 8-bit values beside values in [0, 1] differ by 255; a broken generator of the right scale stays well below this.
_SCALE_MISMATCH = 100.0


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set of samples, the protocol behind them, and the bin `[n]` of every sample.

    `labels` is None where only counts were given. Scores under different protocols do not compare. `warning` says
    why the scores may not mean what they seem to.
    """

    name: str
    result: ndb.NDBResult
    protocol: dict[str, Any]
    labels: np.ndarray | None = None
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: name, ndb, ndb_over_k, js, bins, n_reference, n_samples, threshold, per_bin, protocol."""
        return {"name": self.name, **self.result.to_dict(), "protocol": self.protocol, "warning": self.warning}


def evaluate_samples(
    bins: Bins,
    samples: np.ndarray,
    *,
    name: str,
    scale: str,
    z_threshold: float | None = None,
    significance: float | None = None,
    extras: Mapping[str, Any] | None = None,
) -> Evaluation:
    """NDB and JS divergence of samples `[n, *shape]` against the bins' reference (see `eval.ndb.score`).

    Args:
        name: what made the samples; the heading in tables and figures.
        scale: the scale of the values of reference and samples, in words ("pixels in [0, 1], not dequantised").
        z_threshold, significance: the rule that flags a bin; one of them, or neither for significance 0.05.
        extras: further facts for the protocol (JSON-safe), such as the feature extractor.

    Raises:
        UserError: fewer samples than bins, another shape, values that are not finite or on another scale.
    """
    values = bins.check(samples, name)
    extent = float(max(abs(values.min()), abs(values.max())))
    known = max(abs(edge) for edge in bins.value_range)
    if extent > _SCALE_MISMATCH * known or 0 < extent < known / _SCALE_MISMATCH:
        raise UserError(
            f"{name}: values reach {extent:.3g}, the reference's {known:.3g}: bring both to one scale, such as 0..1"
        )
    labels = bins.assign(values)
    evaluation = evaluate_counts(
        bins,
        np.bincount(labels, minlength=len(bins.counts)),
        name=name,
        scale=scale,
        z_threshold=z_threshold,
        significance=significance,
        extras=extras,
    )
    return replace(evaluation, labels=labels, warning=_scale_warning(bins, values))


def _scale_warning(bins: Bins, values: np.ndarray) -> str | None:
    """Pixels of fewer levels saved as 8-bit, or a generator in [-1, 1], look like one gigantic mode collapse."""
    known = float(np.sqrt(np.average(np.square(bins.centres).mean(1), weights=bins.counts)))
    size = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
    if known and not known / 4 < size < known * 4:
        return (
            f"the samples' root mean square is {size:.3g}, the reference's about {known:.3g}: were both saved on the "
            "same scale?"
        )
    low, high = bins.value_range
    outside = float(np.mean((values < low - 0.1 * (high - low)) | (values > high + 0.1 * (high - low))))
    if outside > 0.05:
        return f"{outside:.0%} of the samples' values lie outside of the reference's range {low:.3g} to {high:.3g}"
    return None


def evaluate_counts(
    bins: Bins,
    counts: np.ndarray,
    *,
    name: str,
    scale: str,
    z_threshold: float | None = None,
    significance: float | None = None,
    extras: Mapping[str, Any] | None = None,
) -> Evaluation:
    """`evaluate_samples` from counts `[K]` that were taken elsewhere, such as the sum over many workers.

    Raises:
        UserError: fewer samples than bins, counts of another number of bins, or an unusable rule.
    """
    n_samples, n_bins = int(np.sum(counts)), len(bins.counts)
    if n_samples < n_bins:
        raise UserError(f"{name}: {n_samples} samples for {n_bins} bins: give more samples or use fewer bins")
    try:
        result = ndb.score(bins.counts, counts, z_threshold=z_threshold, significance=significance)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    protocol = {
        "reference": bins.reference_name,
        "reference_fingerprint": bins.reference_fingerprint,
        "bins_fingerprint": bins.fingerprint,
        "bins": n_bins,
        "n_reference": bins.n_reference,
        "n_samples": n_samples,
        "sample_shape": list(bins.shape),
        "scale": scale,
        "dimensions_used": len(bins.dimensions),
        "dimensions_total": bins.centres.shape[1],
        "clustered_samples": min(bins.settings.max_samples or bins.n_reference, bins.n_reference),
        "whitening": "per feature, by the reference's standard deviation" if bins.settings.whiten else "none",
        "seed": bins.settings.seed,
        "initialisations": bins.settings.n_init,
        "threshold": result.threshold,
        **(extras or {}),
    }
    return Evaluation(name, result, protocol)
