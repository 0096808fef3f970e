"""The picture that names the modes a model misses: bins, members in the reference, and the model's samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from eval import canvas
from eval.bins import Bins
from eval.metrics.ndb import NDBResult
from eval.observed import PIXELS

# Members [m, *shape] of each of the bins that are asked for.
Members = Callable[[np.ndarray], Sequence[np.ndarray]]


def bins_gallery(
    bins: Bins,
    reference: Members,
    samples: Members,
    result: NDBResult,
    *,
    name: str = "model",
    max_rows: int = 12,
    members: int = 8,
) -> bytes:
    """Flagged bins as rows of PNG: proportions and z, the centre, members from the reference, the model's samples.

    Bins with fewer samples come first, then those with more, each by falling evidence; where both do not fit into
    `max_rows`, the former get at least two thirds of them. Where no bin is flagged, the rows with the strongest
    evidence are shown, and the title says so. `reference` and `samples` give members `[m, *shape]` of the bins they
    are asked for, of which the first `members` are drawn. Centres are drawn where they are pictures: in pixel space.
    """
    rows = _rows(result, max_rows)
    images = canvas.is_image(bins.shape)
    cell = max(0.5, 8.4 / (2 * members + 1) * bins.shape[0] / bins.shape[1]) if images else 0.95
    figure = canvas.new_figure(10.4, len(rows) * (cell + 0.06) + 0.7)
    centred = bins.centres is not None and bins.space.name == PIXELS
    widths = [3, *([1 if images else 2.2] if centred else []), members, members]
    grid = figure.subplots(len(rows), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for axes, k, known, put in zip(grid, rows, reference(rows), samples(rows)):
        _describe(axes[0], result, int(k))
        if centred and bins.centres is not None:
            canvas.draw_row(axes[1], bins.centres[k].reshape(1, *bins.shape), 1, canvas.INK)
        left, right = axes[-2:]
        canvas.draw_row(left, known[:members], members, canvas.MUTED)
        colour = canvas.DIRECTION_COLOURS[result.direction(int(k))]
        canvas.draw_row(right, put[:members], members, colour)
        if not images:
            for other in (left, right):
                other.sharey(axes[1])
                other.tick_params(labelleft=False)
    for axes, label in zip(grid[0], ("reference → model", *(["centre"] if centred else []), "reference", name)):
        axes.set_title(label, loc="left", fontsize=9, color=canvas.MUTED, pad=8)
    canvas.heading(figure, _title(result, len(rows)))
    return canvas.png(figure)


def _rows(result: NDBResult, max_rows: int) -> np.ndarray:
    """The bins to show, in the order to show them."""
    order = result.by_evidence()
    flagged = order[result.flagged[order]]
    if len(flagged) == 0:
        return order[:max_rows]
    fewer, more = flagged[result.z[flagged] < 0], flagged[result.z[flagged] > 0]
    first = fewer[: max(max_rows - len(more), math.ceil(max_rows * 2 / 3))]
    return np.concatenate([first, more[: max_rows - len(first)]])


def _title(result: NDBResult, shown: int) -> str:
    if result.ndb == 0:
        return f"No bin of {result.bins} is flagged ({result.threshold}); these have the strongest evidence"
    title = f"{result.ndb} of {result.bins} bins differ: {result.told()} ({result.threshold})"
    return title if shown == result.ndb else f"{title}, {shown} shown"


def _describe(axes: Axes, result: NDBResult, k: int) -> None:
    canvas.bare(axes)
    # A bin that is not flagged is shown for its rank alone, and must not read like a finding.
    near = "equal" if result.z[k] == 0 else f"slightly {'fewer' if result.z[k] < 0 else 'more'}"
    direction = result.direction(k)
    label = direction if result.flagged[k] else near
    shares = f"{100 * result.reference_proportions[k]:.2f} % → {100 * result.sample_proportions[k]:.2f} %"
    colour = canvas.DIRECTION_COLOURS[direction]
    place: dict[str, Any] = {"xy": (0, 0.5), "textcoords": "offset points", "va": "center"}
    axes.annotate(label, xytext=(0, 13), color=colour, fontsize=8.5, fontweight="bold", **place)
    evidence = f"z {result.z[k]:+.1f}".replace("-", "−")
    axes.annotate(f"{shares}\nbin {k}, {evidence}", xytext=(0, -7), color=canvas.INK, fontsize=8, **place)
