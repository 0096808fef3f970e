"""Figures of models in the plane: samples over density contours, training curves of several seeds, critics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval import canvas

_COLUMNS, _SIDE = 4, 3.0
# Contours of a log-density: nats below its highest value.
_DEPTHS = (0.5, 1, 2, 3, 5, 8, 12)


@dataclass(frozen=True)
class Panel:
    """One model in the plane.

    `drawn` has `extent` [2, 2] (rows x and y: low, high) and may have `truth` [n, 2], samples `x` [n, 2] with their
    `component` [n], the log-density `density` [h, w] in nats and a critic's values `critic` [h, w] on a grid over the
    extent (row 0 at the lowest y), and `weights` [n] of a critic.
    """

    title: str
    drawn: Mapping[str, np.ndarray]


@torch.no_grad()
def in_the_plane(
    model: Any, truth: np.ndarray, *, samples: int = 2000, side: int = 120, seed: int = 0
) -> dict[str, Any]:
    """What a panel shows of a model of samples [2]: on a grid around the data `truth` [n, 2]."""
    low, high = truth.min(0), truth.max(0)
    margin = 0.15 * (high - low)
    axes = [np.linspace(a, b, side, dtype=np.float32) for a, b in zip(low - margin, high + margin)]
    x = model.sample(samples, torch.Generator().manual_seed(seed))
    found = {"truth": truth, "extent": np.array([[axis[0], axis[-1]] for axis in axes]), "x": x.numpy()}
    if hasattr(model, "log_prob"):
        grid = torch.from_numpy(np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2))
        found["density"] = model.log_prob(grid).numpy().reshape(side, side)
    if hasattr(model, "responsibilities"):
        found["component"] = model.responsibilities(x).argmax(1).numpy()
    return found


def density_panels(panels: Sequence[Panel]) -> bytes:
    """Samples by component over contours of the log-density and pale data, one panel a model."""
    figure, places = _grid(len(panels))
    for axes, panel in zip(places, panels):
        found = panel.drawn
        _plane(axes, panel)
        if "truth" in found:
            axes.scatter(found["truth"][:, 0], found["truth"][:, 1], s=2, color=canvas.PALE, alpha=0.5, linewidths=0)
        if "density" in found:
            density = np.nan_to_num(found["density"], neginf=-1e9)
            levels = sorted(float(density.max()) - depth for depth in _DEPTHS)
            axes.contour(*_coordinates(found, density), density, levels=levels, colors=canvas.MUTED, linewidths=0.4)
        if "x" in found:
            component = found.get("component", np.zeros(len(found["x"]), int))
            colours = colormaps["tab10"](component % 10) if component.max(initial=0) else canvas.BLUE
            axes.scatter(found["x"][:, 0], found["x"][:, 1], s=2.5, c=colours, linewidths=0, alpha=0.8)
    return canvas.png(figure)


def critic_surfaces(panels: Sequence[Panel]) -> bytes:
    """A critic's values over the data; where its `weights` are given, their histogram below."""
    weighed = any("weights" in panel.drawn for panel in panels)
    figure, places = _grid(len(panels), rows_each=2 if weighed else 1)
    for axes, panel in zip(places[: len(panels)], panels):
        found = panel.drawn
        _plane(axes, panel)
        values = found["critic"]
        axes.contourf(*_coordinates(found, values), values, levels=24, cmap="viridis")
        axes.contour(*_coordinates(found, values), values, levels=12, colors="white", linewidths=0.3, alpha=0.6)
        if "truth" in found:
            axes.scatter(
                found["truth"][:, 0], found["truth"][:, 1], s=1, color=canvas.VERMILLION, alpha=0.35, linewidths=0
            )
    for axes, panel in zip(places[len(panels) :], panels):
        axes.set_visible("weights" in panel.drawn)
        if "weights" in panel.drawn:
            canvas.style_axes(axes)
            axes.hist(panel.drawn["weights"], bins=60, color=canvas.BLUE, density=True)
            axes.set_title(f"weights of {panel.title}", fontsize=9, color=canvas.INK, loc="left")
    return canvas.png(figure)


def training_curves(
    curves: Mapping[str, tuple[Sequence[int], np.ndarray]],
    *,
    label: str,
    truth: float | None = None,
    logarithmic: bool = False,
) -> bytes:
    """Mean and one standard deviation over seeds: steps and values [seeds, entries] of each model; `truth` dashed.

    `logarithmic` is for positive values that fall through magnitudes; all of them are shown.
    """
    figure = canvas.new_figure(9, 4)
    axes = figure.add_subplot()
    canvas.style_axes(axes)
    late: list[np.ndarray] = []
    for number, (name, (steps, values)) in enumerate(curves.items()):
        values = np.where(np.isfinite(values), values, np.nan)
        mean, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        colour = colormaps["tab10"](number % 10)
        axes.plot(steps, mean, color=colour, linewidth=1.4, label=name)
        axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        late.append(mean[len(mean) // 20 :])
    if truth is not None:
        axes.axhline(truth, color=canvas.INK, linestyle="--", linewidth=0.9)
    if logarithmic:
        axes.set_yscale("log")
    else:
        settled = np.concatenate(late)
        settled = settled[np.isfinite(settled)]
        low = settled.min() if truth is None else min(settled.min(), truth)
        # What has not settled yet would flatten everything else.
        high = min(settled.max(), low + 6 * max(float(np.median(settled)) - low, 1e-3))
        axes.set_ylim(low - 0.08 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel("step", fontsize=9, color=canvas.MUTED)
    axes.set_ylabel(label, fontsize=9, color=canvas.MUTED)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    return canvas.png(figure)


def scores_by_size(points: Mapping[str, Sequence[tuple[float, Sequence[float]]]], *, label: str) -> bytes:
    """A score against the number of parameters: for each kind of model, (parameters, values over seeds)."""
    figure = canvas.new_figure(7.4, 4)
    axes = figure.add_subplot()
    canvas.style_axes(axes)
    for number, (name, found) in enumerate(points.items()):
        ordered = sorted(found, key=lambda point: point[0])
        sizes, means = [size for size, _ in ordered], [float(np.mean(values)) for _, values in ordered]
        spread = [float(np.std(values)) for _, values in ordered]
        colour = colormaps["tab10"](number % 10)
        axes.errorbar(sizes, means, spread, color=colour, marker="o", markersize=5, capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("parameters", fontsize=9, color=canvas.MUTED)
    axes.set_ylabel(label, fontsize=9, color=canvas.MUTED)
    axes.legend(fontsize=8.5, frameon=False)
    return canvas.png(figure)


def _grid(n: int, rows_each: int = 1) -> tuple[Figure, list[Axes]]:
    """Axes for n panels, all of one row before those of the next; with `rows_each` 2, one row of each kind a time."""
    columns = min(n, _COLUMNS if rows_each == 1 else n)
    rows = math.ceil(n / columns) * rows_each
    figure = canvas.new_figure(_SIDE * columns, _SIDE * rows)
    places = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axes in places[n * rows_each :]:
        axes.set_visible(False)
    return figure, places


def _plane(axes: Axes, panel: Panel) -> None:
    (left, right), (low, high) = panel.drawn["extent"]
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.tick_params(colors=canvas.MUTED, labelsize=7, length=2)
    for spine in axes.spines.values():
        spine.set_color(canvas.PALE)
    axes.set_title(panel.title, fontsize=9, color=canvas.INK, loc="left")


def _coordinates(found: Mapping[str, np.ndarray], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (left, right), (low, high) = found["extent"]
    return np.linspace(left, right, values.shape[1]), np.linspace(low, high, values.shape[0])
