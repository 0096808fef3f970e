"""The report's figures. Each returns PNG bytes, and draws images, and samples that are none, in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from eval import canvas
from eval.evaluate import Evaluation
from eval.metrics.ndb import NDBResult


def sample_grid(x: np.ndarray, rows: int, columns: int, title: str | None = None) -> bytes:
    """The first `rows * columns` samples `[n, *shape]`.

    Images in [0, 1] become a grid; points in the plane a scatter plot of all `n`; other vectors a heat map with one
    row per sample.
    """
    if canvas.is_image(x.shape[1:]):
        sheet = canvas.tile(x[: rows * columns], columns)
        width = 5.4
        figure = canvas.new_figure(width, width * sheet.shape[0] / sheet.shape[1] + (0.35 if title else 0.05))
        canvas.show(figure.add_subplot(), sheet)
    else:
        figure = canvas.new_figure(5.4, 4.4)
        _vectors(figure.add_subplot(), x.reshape(len(x), -1), rows * columns)
    if title:
        canvas.heading(figure, title)
    return canvas.png(figure)


def training_curve(
    steps: Sequence[float],
    losses: Sequence[float],
    *,
    title: str = "Training",
    label: str = "loss",
    unit: str = "step",
    validation: tuple[Sequence[float], Sequence[float]] | None = None,
) -> bytes:
    """Losses over steps: every value pale, medians over hundredths of them on top; `validation` as points.

    Values that are not finite are left out.
    """
    y = np.asarray(losses, float)
    finite = np.isfinite(y)
    x, y = np.asarray(steps, float)[finite], y[finite]
    figure = canvas.new_figure(9, 3.2)
    axes = figure.add_subplot()
    canvas.style_axes(axes)
    noisy = len(y) >= 200
    axes.plot(x, y, color=canvas.PALE if noisy else canvas.BLUE, linewidth=0.7 if noisy else 1.8, label=unit)
    if noisy:
        middles, medians = ([np.median(part) for part in np.array_split(v, 100)] for v in (x, y))
        axes.plot(middles, medians, color=canvas.BLUE, linewidth=1.8, label="median")
    if validation is not None:
        axes.plot(*validation, color=canvas.VERMILLION, marker="o", markersize=4, linewidth=1.2, label="validation")
    # The first steps may lie orders of magnitude off and would flatten all that follows.
    settled = y[len(y) // 20 :]
    if len(settled) > 20 and np.ptp(y) > 4 * np.ptp(settled):
        margin = 0.15 * np.ptp(settled)
        axes.set_ylim(settled.min() - margin, settled.max() + 3 * margin)
    axes.set_xlabel(unit, fontsize=9, color=canvas.MUTED)
    axes.set_ylabel(label, fontsize=9, color=canvas.MUTED)
    if noisy or validation is not None:
        axes.legend(fontsize=8.5, frameon=False, labelcolor=canvas.INK)
    canvas.heading(figure, title)
    return canvas.png(figure)


def binning_proportions(results: Sequence[Evaluation], title: str = "Binning proportions") -> bytes:
    """One panel per model over common axes: the reference's bin proportions as a filled outline, largest bin first.

    The band is reference ± z se, with se as in `eval.metrics.ndb.two_proportion_z` at the reference's proportion and z
    the model's threshold: points outside of it are (nearly exactly) the flagged bins, marked by triangles.
    """
    if not results:
        raise ValueError("binning_proportions needs at least one evaluation")
    figure = canvas.new_figure(9.4, 0.75 + 1.65 * len(results))
    panels = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    # A collapsed model may put half of its samples into one bin; the others must stay readable.
    band = max(_band(r.result)[1].max() for r in results)
    top = min(3 * band, 1.1 * max(band, *(100 * r.result.sample_proportions.max() for r in results)))
    for axes, evaluation in zip(panels, results):
        _proportions(axes, evaluation.result, top)
        axes.set_title(evaluation.name, loc="left", fontsize=10, color=canvas.INK)
        scores = f"NDB {evaluation.result.ndb} of {evaluation.result.bins}   JS {evaluation.result.js:.4f}"
        axes.set_title(scores, loc="right", fontsize=9.5, color=canvas.MUTED)
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter("{x:g} %")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("bin, largest first", fontsize=9, color=canvas.MUTED)
    canvas.heading(figure, title)
    handles, labels = panels[0].get_legend_handles_labels()
    style = {"fontsize": 8.5, "frameon": False, "labelcolor": canvas.INK}
    figure.legend(handles, labels, loc="outside lower center", ncols=5, **style)
    return canvas.png(figure)


_COMPONENTS_LEGEND = (
    "μ: mean of the component.  A: loading of one factor, a column each; a step of one standard deviation along it "
    "adds A to μ.  π: share of the component."
)


def components(
    means: np.ndarray,
    noise_std: np.ndarray,
    loadings: np.ndarray,
    mixing: np.ndarray,
    max_components: int = 8,
    max_factors: int = 5,
) -> bytes:
    """The components of a mixture of factor analysers with the largest mixing coefficients pi.

    Arguments: means mu and noise standard deviations `[K, *shape]`, factor loadings A `[K, *shape, l]`, mixing
    coefficients `[K]`. Images: mean and noise on the left, then per factor mu + A, 1/2 + A, mu - A (Richardson and
    Weiss 2018, supplement, fig. 15). Other vectors: the mean with a band of the noise, and mu ± A as thin curves.
    """
    chosen = np.argsort(-np.asarray(mixing), kind="stable")[:max_components]
    factors = min(max_factors, loadings.shape[-1])
    shape, brightest = means.shape[1:], float(np.max(noise_std[chosen])) or 1.0
    images = canvas.is_image(shape)
    across = max(1, min(2, len(chosen)))
    down = math.ceil(len(chosen) / across)
    # The height that rows of images need at the width that the row labels leave.
    height = 8.3 / across * 3 * shape[0] / ((1 + factors) * shape[1]) + 0.3 if images else 2.1
    figure = canvas.new_figure(9.4, down * height + 0.4)
    cells = figure.subplots(down, across, squeeze=False).reshape(-1)
    for axes in cells[len(chosen) :]:
        axes.set_visible(False)
    for axes, k in zip(cells, chosen):
        steps = np.moveaxis(loadings[k], -1, 0)[:factors]
        if images:
            _component_images(axes, means[k], noise_std[k] / brightest, steps)
            if axes not in cells[::across]:
                axes.set_yticks([])
        else:
            mean, noise = means[k].reshape(-1), noise_std[k].reshape(-1)
            _component_curves(axes, mean, noise, steps.reshape(factors, len(mean)))
        axes.set_title(f"component {k}, π = {mixing[k]:.3g}", loc="left", fontsize=9, color=canvas.INK)
    scaled = f"noise shown relative to {brightest:.2g}" if images else "band: noise, thin: factors"
    canvas.heading(figure, f"The {len(chosen)} largest of {len(means)} components ({scaled})")
    figure.supxlabel(_COMPONENTS_LEGEND, fontsize=8, color=canvas.MUTED)
    return canvas.png(figure)


def _component_images(axes: Axes, mean: np.ndarray, noise: np.ndarray, steps: np.ndarray) -> None:
    rows = [[mean, *(mean + steps)], [noise, *(0.5 + steps)], [np.ones_like(mean), *(mean - steps)]]
    sheet = canvas.tile(np.array([cell for row in rows for cell in row]), 1 + len(steps))
    canvas.show(axes, sheet)
    middles = (np.arange(3) + 0.5) / 3 * len(sheet)
    axes.set_yticks(middles, ["μ  |  μ + A", "noise  |  ½ + A", "μ − A"], fontsize=7.5, color=canvas.MUTED)
    axes.tick_params(length=0)


def _component_curves(axes: Axes, mean: np.ndarray, noise: np.ndarray, steps: np.ndarray) -> None:
    canvas.style_axes(axes)
    x = np.arange(len(mean))
    axes.fill_between(x, mean - noise, mean + noise, color=canvas.FAINT)
    for step in steps:
        axes.plot(x, np.stack([mean + step, mean - step], axis=1), color=canvas.BLUE, linewidth=0.7, alpha=0.7)
    axes.plot(x, mean, color=canvas.INK, linewidth=1.6, marker="o" if len(mean) < 8 else "", markersize=3)


def _vectors(axes: Axes, flat: np.ndarray, shown: int) -> None:
    """Points in the plane as a scatter plot, longer vectors as a heat map."""
    if flat.shape[1] == 2:
        canvas.style_axes(axes)
        axes.scatter(flat[:, 0], flat[:, 1], s=6, color=canvas.BLUE, alpha=0.5, linewidths=0)
        axes.set_aspect("equal", "datalim")
        return
    image = axes.imshow(flat[:shown], aspect="auto", cmap="cividis", interpolation="nearest")
    axes.tick_params(colors=canvas.MUTED, labelsize=8.5)
    axes.set_xlabel("feature", fontsize=9, color=canvas.MUTED)
    axes.set_ylabel("sample", fontsize=9, color=canvas.MUTED)
    axes.figure.colorbar(image, ax=axes, fraction=0.05).ax.tick_params(colors=canvas.MUTED, labelsize=8.5)


def _proportions(axes: Axes, result: NDBResult, top: float) -> None:
    """One model's panel of `binning_proportions`, in per cent."""
    canvas.style_axes(axes)
    x, reference = np.arange(result.bins), 100 * result.reference_proportions
    low, high = _band(result)
    edges, band = np.arange(result.bins + 1) - 0.5, f"reference ± {result.z_threshold:.3g} se"
    axes.stairs(reference, edges, fill=True, color=canvas.FAINT, label="reference")
    axes.stairs(high, edges, baseline=low, fill=True, color=canvas.GREEN, alpha=0.22, linewidth=0, label=band)
    axes.stairs(reference, edges, baseline=None, color=canvas.MUTED, linewidth=0.9)
    size, values = max(1.8, min(5.0, 250 / result.bins)), 100 * result.sample_proportions
    axes.plot(x, values, color=canvas.INK, linewidth=0.4, alpha=0.6)
    inside = x[~result.flagged]
    axes.plot(inside, values[inside], color=canvas.INK, linestyle="", marker="o", markersize=size, label="model")
    for direction, marker, sign in (("fewer", "v", -1), ("more", "^", 1)):
        marked = x[result.flagged & (np.sign(result.z) == sign)]
        (points,) = axes.plot(
            marked,
            np.minimum(values[marked], 0.96 * top),
            linestyle="",
            marker=marker,
            markersize=max(6.0, size + 2),
            color=canvas.DIRECTION_COLOURS[direction],
            markeredgecolor="white",
            markeredgewidth=0.6,
            clip_on=False,
            zorder=4,
            label=f"differs: {direction}",
        )
        # Without points, an artist that is not clipped would stretch the layout down to the figure's corner.
        points.set_in_layout(False)
    axes.set_xlim(-0.5, result.bins - 0.5)
    highest = int(np.argmax(values))
    if values[highest] > top:
        right = highest > 0.9 * result.bins
        axes.annotate(
            f"highest: {values[highest]:.2g} %",
            (highest, 0.96 * top),
            (-8 if right else 8, -3),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        ).set_in_layout(False)


def _band(result: NDBResult) -> tuple[np.ndarray, np.ndarray]:
    """Reference proportion ± z se per bin, in per cent."""
    share = result.reference_proportions
    error = np.sqrt(share * (1 - share) * (1 / result.n_reference + 1 / result.n_samples))
    return 100 * np.maximum(share - result.z_threshold * error, 0), 100 * (share + result.z_threshold * error)
