"""The picture that names the modes a model misses: bins, members in the reference, and the model's samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from eval import canvas
from eval.bins import Bins
from eval.ndb import NDBResult


def bins_gallery(
    bins: Bins,
    reference: np.ndarray,
    reference_labels: np.ndarray,
    samples: np.ndarray,
    sample_labels: np.ndarray,
    result: NDBResult,
    *,
    name: str = "model",
    max_rows: int = 12,
    members: int = 8,
) -> bytes:
    """Flagged bins as rows of PNG: proportions and z, the centre, members from the reference, the model's samples.

    Missing modes come first, then over-represented ones, each by falling |z|; where both do not fit into
    `max_rows`, missing modes get at least two thirds of them. Where no bin is flagged, the rows with the strongest
    evidence are shown, and the title says so. Samples are `[n, *shape]`, labels `[n]` their bins; the first
    `members` of each bin are drawn.
    """
    rows = _rows(result, max_rows)
    images = canvas.is_image(bins.shape)
    cell = max(0.5, 8.4 / (2 * members + 1) * bins.shape[0] / bins.shape[1]) if images else 0.95
    figure = canvas.new_figure(10.4, len(rows) * (cell + 0.06) + 0.7)
    widths = [3, 1 if images else 2.2, members, members]
    grid = figure.subplots(len(rows), 4, squeeze=False, gridspec_kw={"width_ratios": widths})
    for (text, centre, left, right), k in zip(grid, rows):
        _describe(text, result, int(k))
        canvas.draw_row(centre, bins.centres[k].reshape(1, *bins.shape), 1, canvas.INK)
        canvas.draw_row(left, reference[reference_labels == k][:members], members, canvas.MUTED)
        colour = canvas.DIRECTION_COLOURS[result.direction(int(k))]
        canvas.draw_row(right, samples[sample_labels == k][:members], members, colour)
        if not images:
            for axes in (left, right):
                axes.sharey(centre)
                axes.tick_params(labelleft=False)
    for axes, label in zip(grid[0], ("reference → model", "centre", "reference", name)):
        axes.set_title(label, loc="left", fontsize=9, color=canvas.MUTED, pad=8)
    canvas.heading(figure, _title(result, len(rows)))
    return canvas.png(figure)


def _rows(result: NDBResult, max_rows: int) -> np.ndarray:
    """The bins to show, in the order to show them."""
    order = result.by_evidence()
    flagged = order[result.flagged[order]]
    if len(flagged) == 0:
        return order[:max_rows]
    missing, over = flagged[result.z[flagged] < 0], flagged[result.z[flagged] > 0]
    first = missing[: max(max_rows - len(over), math.ceil(max_rows * 2 / 3))]
    return np.concatenate([first, over[: max_rows - len(first)]])


def _title(result: NDBResult, shown: int) -> str:
    if result.ndb == 0:
        return f"No bin of {result.bins} is flagged ({result.threshold}); these have the strongest evidence"
    missing = int(np.count_nonzero(result.flagged & (result.z < 0)))
    over = result.ndb - missing
    title = f"{missing} missing and {over} over-represented bins of {result.bins} ({result.threshold})"
    return title if shown == result.ndb else f"{title}, {shown} shown"


def _describe(axes: Axes, result: NDBResult, k: int) -> None:
    canvas.bare(axes)
    direction = result.direction(k)
    # A bin that is not flagged is shown for its rank alone, and must not read like a finding.
    label = direction if result.flagged[k] else "fewer" if result.z[k] < 0 else "more" if result.z[k] > 0 else "equal"
    shares = f"{100 * result.reference_proportions[k]:.2f} % → {100 * result.sample_proportions[k]:.2f} %"
    colour = canvas.DIRECTION_COLOURS[direction] if result.flagged[k] else canvas.MUTED
    place: dict[str, Any] = {"xy": (0, 0.5), "textcoords": "offset points", "va": "center"}
    axes.annotate(label, xytext=(0, 13), color=colour, fontsize=8.5, fontweight="bold", **place)
    evidence = f"z {result.z[k]:+.1f}".replace("-", "−")
    axes.annotate(f"{shares}\nbin {k}, {evidence}", xytext=(0, -7), color=canvas.INK, fontsize=8, **place)
