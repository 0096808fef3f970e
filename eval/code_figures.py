"""Pictures of an autoencoder: its codes over their prior, and what is decoded from lines and grids of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval import canvas
from eval.codes import shifted_uniforms

# Six of M. Okabe and K. Ito's, and four that stay apart from them, dark enough for small points on white.
_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800"),
    *("#1f2328", "#882255", "#7F8C8D"),
)
_MOST_POINTS = 10_000


def code_scatter(
    codes: np.ndarray, labels: np.ndarray | None, prior: np.ndarray, names: Sequence[str] | None = None
) -> bytes:
    """Codes [n, K] by label over draws [m, K] of the prior; of longer codes their first two principal components.

    Both share axes: draws of the prior are grey in both panels, the codes lie over them in the right one.
    """
    codes, prior = codes[:_MOST_POINTS], prior[:_MOST_POINTS]
    axis = ("z₁", "z₂")
    if codes.shape[1] != 2:
        centre = codes.mean(0)
        axes_of = np.linalg.svd(codes - centre, full_matrices=False)[2][:2]
        if len(axes_of) < 2:  # codes of one dimension
            axes_of = np.concatenate([axes_of, np.zeros_like(axes_of)])
        codes, prior, axis = (codes - centre) @ axes_of.T, (prior - centre) @ axes_of.T, ("component 1", "component 2")
    figure = canvas.new_figure(9.4, 4.9)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    size = float(np.clip(5000 / len(codes), 2, 16))
    for axes, title in zip(panels, ("Prior", "Codes")):
        canvas.style_axes(axes)
        axes.scatter(*prior.T, s=size, color=canvas.PALE, alpha=0.5, linewidths=0, rasterized=True)
        axes.set_title(title, loc="left", fontsize=10, color=canvas.INK)
        axes.set_aspect("equal", "box")
        axes.set_xlabel(axis[0], fontsize=9, color=canvas.MUTED)
    panels[0].set_ylabel(axis[1], fontsize=9, color=canvas.MUTED)
    if labels is None:
        panels[1].scatter(*codes.T, s=size, color=canvas.BLUE, linewidths=0)
    else:
        labels = labels[: len(codes)]
        found = np.unique(labels)
        colours = np.array(_COLOURS)[np.searchsorted(found, labels) % len(_COLOURS)]
        panels[1].scatter(*codes.T, s=size, color=colours, linewidths=0)
        if len(found) <= len(_COLOURS):
            for place, label in enumerate(found):
                known = names is not None and 0 <= label < len(names)
                text = names[label] if known and names is not None else str(label)
                panels[1].plot([], [], color=_COLOURS[place], marker="o", linestyle="", markersize=5, label=text)
            style = {"fontsize": 8.5, "frameon": False, "labelcolor": canvas.INK}
            figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", **style)
    canvas.heading(figure, "Codes by label, over draws of the prior (grey)")
    return canvas.png(figure)


def image_sheet(x: np.ndarray, title: str, columns: Sequence[str] = (), rows: Sequence[str] = ()) -> bytes:
    """A grid of images [rows, columns, *shape] in [0, 1], with labels of its columns and rows.

    Raises:
        UserError: samples that are not images.
    """
    down, across = x.shape[:2]
    sheet = canvas.tile(x.reshape(-1, *x.shape[2:]), across)
    width = 7.4 if across > 12 else 0.62 * across + 0.6
    figure = canvas.new_figure(width, width * sheet.shape[0] / sheet.shape[1] + 0.45)
    axes = figure.add_subplot()
    canvas.show(axes, sheet)
    style: dict[str, Any] = {"fontsize": 8, "color": canvas.MUTED}
    if columns:
        axes.set_xticks((np.arange(across) + 0.5) / across * sheet.shape[1], columns, **style)
        axes.xaxis.tick_top()
    if rows:
        axes.set_yticks((np.arange(down) + 0.5) / down * sheet.shape[0], rows, **style)
    axes.tick_params(length=0)
    canvas.heading(figure, title)
    return canvas.png(figure)


def wasserstein_against_js() -> bytes:
    """Figure 6 of Kolouri et al.: W₁ and JS between a uniform density and itself shifted by τ; a pair of them above."""
    shifts = np.linspace(-3, 3, 601)
    distance, divergence = shifted_uniforms(shifts)
    figure = canvas.new_figure(7.4, 5.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
    canvas.style_axes(above)
    for middle, colour, name in ((0.0, canvas.INK, "p(x)"), (1.6, canvas.GREEN, "q(x) = p(x − τ), here τ = 1.6")):
        inside = np.abs(shifts - middle) <= 0.5
        above.fill_between(shifts, np.where(inside, 1.0, 0.0), step="mid", color=colour, alpha=0.35, label=name)
    above.set_yticks([])
    canvas.style_axes(below)
    below.plot(shifts, distance, color=canvas.BLUE, linewidth=2, label="W₁(p, q), in units of τ")
    below.plot(
        shifts,
        divergence,
        color=canvas.VERMILLION,
        linewidth=2,
        label="JS(p, q) without the ½, in nats",
    )
    below.axvspan(-1, 1, color=canvas.FAINT, alpha=0.5, linewidth=0, label="p and q overlap")
    below.set_xlabel("shift τ", fontsize=9, color=canvas.MUTED)
    for axes, place in ((above, "upper left"), (below, "upper center")):
        axes.legend(fontsize=8.5, frameon=False, labelcolor=canvas.INK, loc=place)
    canvas.heading(figure, "Where two densities do not overlap, JS is flat and W₁ still points home")
    return canvas.png(figure)
