"""Pictures of what a mixture of factor analysers has learnt, and of what it makes of samples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from data.errors import UserError
from eval import canvas, figures


def components_of(model: Any, shape: tuple[int, ...]) -> bytes | None:
    """The picture of `eval.figures.components` for a mixture of samples `[*shape]`; None for another model."""
    if not hasattr(model, "factor_loadings"):
        return None
    loadings = model.factor_loadings.detach().numpy()
    return figures.components(
        model.means.detach().numpy().reshape(-1, *shape),
        model.noise_variance.detach().sqrt().numpy().reshape(-1, *shape),
        loadings.reshape(len(loadings), *shape, -1),
        model.mixing_coefficients.detach().numpy(),
    )


def factor_grid(mean: np.ndarray, across: np.ndarray, down: np.ndarray, *, title: str, steps: int = 9) -> bytes:
    """A component's images μ + a A_i + b A_j for a (left to right) and b (top to bottom) from -2 to 2.

    Arguments: mean μ and the two factors' loadings `[*shape]`.

    Raises:
        UserError: samples that are not images.
    """
    values = np.linspace(-2, 2, steps)
    sheet = canvas.tile(np.stack([mean + a * across + b * down for b in values for a in values]), steps)
    figure = canvas.new_figure(7.4, 7.4 * sheet.shape[0] / sheet.shape[1] + 0.35)
    canvas.show(figure.add_subplot(), sheet)
    canvas.heading(figure, title)
    return canvas.png(figure)


def outlier_sheet(x: np.ndarray, log_probs: np.ndarray) -> bytes:
    """Samples `[n, *shape]`, the least likely first, with their log-likelihoods (`[n]`, nats)."""
    texts = [f"{value:,.0f}".replace("-", "−") for value in log_probs]
    return canvas.labelled_sheet(x, texts, f"The {len(x)} least likely samples (log-likelihood in nats)")


def rows_of_images(rows: Sequence[tuple[str, np.ndarray]], title: str) -> bytes:
    """Labelled rows of samples `[n, *shape]`, one column per sample: originals, what is seen, completions, ..."""
    n, shape = rows[0][1].shape[0], rows[0][1].shape[1:]
    images = canvas.is_image(shape)
    cell = 8.4 / n * shape[0] / shape[1] if images else 1.0
    figure = canvas.new_figure(9.4, len(rows) * (cell + 0.08) + 0.5)
    for axes, (label, x) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows):
        canvas.draw_row(axes, x, n, canvas.INK)
        axes.set_ylabel(label, fontsize=8.5, color=canvas.MUTED, rotation=0, ha="right", va="center")
    canvas.heading(figure, title)
    return canvas.png(figure)


def likelihood_by_components(points: Sequence[tuple[str, int, float, float]]) -> bytes:
    """Test log-likelihood (nats per sample, with standard errors) against the number of components.

    Arguments: (name, components, mean, standard error) per model.
    """
    figure = canvas.new_figure(7.4, 4.0)
    axes = figure.add_subplot()
    canvas.style_axes(axes)
    ordered = sorted(points, key=lambda point: point[1])
    x, y, error = ([point[i] for point in ordered] for i in (1, 2, 3))
    axes.errorbar(x, y, error, color=canvas.BLUE, marker="o", markersize=5, linewidth=1.6, capsize=3)
    for name, k, mean, _ in ordered:
        axes.annotate(name, (k, mean), (6, -11), textcoords="offset points", fontsize=8, color=canvas.MUTED)
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(x)), [str(k) for k in sorted(set(x))])
    axes.minorticks_off()
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("components", fontsize=9, color=canvas.MUTED)
    axes.set_ylabel("log-likelihood (nats per sample)", fontsize=9, color=canvas.MUTED)
    canvas.heading(figure, "Log-likelihood of held-out samples")
    return canvas.png(figure)


def animation(frames: np.ndarray, *, milliseconds: int = 60) -> bytes:
    """Images `[n, *shape]` as an endless animated GIF.

    Raises:
        UserError: samples that are not images.
    """
    if not canvas.is_image(frames.shape[1:]):
        raise UserError(f"samples of shape {list(frames.shape[1:])} are not images: there is nothing to animate")
    pictures = [Image.fromarray(_enlarged(canvas.tile(frame[None], 1), 224)) for frame in frames]
    out = io.BytesIO()
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    return out.getvalue()


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
    zoom = max(1, side // max(image.shape[:2]))
    return image.repeat(zoom, 0).repeat(zoom, 1)
