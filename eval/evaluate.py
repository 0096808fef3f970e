"""Judges a set of samples by fitted bins: the scores, and the protocol that they hold under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import UserError
from eval.bins import BinCounts, Bins
from eval.metrics import ndb
from eval.observed import Extent

# 8-bit values beside values in [0, 1] differ by 255; a broken generator of the right scale stays well below this.
_SCALE_MISMATCH = 100.0
# Pixels that reach no further into the range of their type were meant on another scale, or nearly all is black.
_DIM = 0.25


@dataclass(frozen=True)
class Rule:
    """Which bins are flagged: |z| above `z_threshold`, or p below `significance`; 0.05 where neither is given."""

    z_threshold: float | None = None
    significance: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set of samples and the protocol behind them.

    `members` `[K, m]` are positions of some of each bin's samples (-1: none). Scores under different protocols do not
    compare. `warning` says why the scores may not mean what they seem to.
    """

    name: str
    result: ndb.NDBResult
    protocol: dict[str, Any]
    members: np.ndarray
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: name, the scores and every bin (see `NDBResult.to_dict`), protocol, warning."""
        return {"name": self.name, **self.result.to_dict(), "protocol": self.protocol, "warning": self.warning}


def evaluate_counts(
    bins: Bins,
    seen: BinCounts,
    extent: Extent,
    *,
    name: str,
    scale: str,
    rule: Rule,
    levels: int | None = None,
    extras: Mapping[str, Any] | None = None,
) -> Evaluation:
    """NDB and JS divergence of samples against the bins' reference (see `eval.metrics.ndb.score`).

    Args:
        bins: the yardstick.
        seen, extent: what one pass over the samples found.
        name: what made the samples; the heading in tables and figures.
        scale: the scale of the values of reference and samples, in words ("pixels in [0, 1], not dequantised").
        rule: which bins are flagged.
        levels: number of values that a pixel of the samples may take, as they are stored; None for real numbers.
        extras: further facts for the protocol (JSON-safe).

    Raises:
        UserError: fewer samples than bins, values on another scale, or an unusable rule.
    """
    check_scale(bins, extent, name)
    n_samples, n_bins = int(seen.counts.sum()), len(bins.counts)
    if n_samples < n_bins:
        raise UserError(f"{name}: {n_samples} samples for {n_bins} bins: give more samples or use fewer bins")
    try:
        result = ndb.score(bins.counts, seen.counts, z_threshold=rule.z_threshold, significance=rule.significance)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    reached = narrow_range(extent.high, levels)
    warnings = [_scale_warning(bins, extent), reached]
    protocol = {
        "reference": bins.reference_name,
        "reference_fingerprint": bins.reference_fingerprint,
        "bins_fingerprint": bins.fingerprint,
        "bins": n_bins,
        "n_reference": bins.n_reference,
        "n_samples": n_samples,
        "sample_shape": list(bins.shape),
        "scale": scale,
        **({} if reached is None else {"samples_reach": reached}),
        "space": bins.space.name,
        "space_fingerprint": bins.space.fingerprint,
        "dimensions_used": len(bins.dimensions),
        "dimensions_total": 0 if bins.centres is None else bins.centres.shape[1],
        "clustered_samples": bins.clustered,
        "whitening": "per feature, by the reference's standard deviation" if bins.settings.whiten else "none",
        "seed": bins.settings.seed,
        "initialisations": bins.settings.n_init,
        "threshold": result.threshold,
        **(extras or {}),
    }
    return Evaluation(name, result, protocol, seen.members(), "; ".join(filter(None, warnings)) or None)


def check_scale(bins: Bins, extent: Extent, name: str) -> None:
    """Refuses samples whose values lie on another scale than the reference's, such as 0..255 beside 0..1.

    Raises:
        UserError: with the two extents.
    """
    reach = max(abs(extent.low), abs(extent.high))
    known = max(abs(edge) for edge in bins.value_range)
    if reach > _SCALE_MISMATCH * known or 0 < reach < known / _SCALE_MISMATCH:
        raise UserError(
            f"{name}: values reach {reach:.3g}, the reference's {known:.3g}: bring both to one scale, such as 0..1"
        )


def narrow_range(high: float, levels: int | None) -> str | None:
    """Says where pixels, divided by levels - 1, stay far below 1: `high` is the largest; None where they do not."""
    if levels is None or high >= _DIM:
        return None
    most = round(high * (levels - 1))
    told = f"values reach only {most} of {levels - 1}, by which they are divided"
    return f"{told}: if {most} is meant to be white, save them as float32, divided by {most}" if most else told


def _scale_warning(bins: Bins, extent: Extent) -> str | None:
    """Pixels of fewer levels saved as 8-bit, or a generator in [-1, 1], look like one gigantic mode collapse."""
    known, size = bins.root_mean_square, extent.root_mean_square
    if known and not known / 4 < size < known * 4:
        return (
            f"the samples' root mean square is {size:.3g}, the reference's about {known:.3g}: were both saved on the "
            "same scale?"
        )
    low, high = bins.value_range
    slack = 0.5 * (high - low)
    if extent.low < low - slack or extent.high > high + slack:
        return (
            f"the samples' values go from {extent.low:.3g} to {extent.high:.3g}, the reference's from {low:.3g} to "
            f"{high:.3g}"
        )
    return None
