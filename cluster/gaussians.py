"""What the Gaussians of a generator's latent mixture draw: samples of each, and ways from one to another."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cluster.models import LocalModel
from data.errors import UserError
from eval import mixture_figures
from eval.canvas import is_image
from eval.figures import sample_grid
from eval.report import ReportFigure, ReportSection
from trainer.models.latent_mixture import LatentMixture, barycentric

_OF_EACH, _STEPS, _ROWS, _FRAMES = 10, 10, 9, 8
_MOST = 20  # Gaussians in a picture
_NAMES = {"each": "gaussians.png", "paths": "paths.png", "triangle": "triangle.png"}


@torch.no_grad()
def drawn(model: LatentMixture, shape: tuple[int, ...], seed: int, first: int = 0) -> dict[str, np.ndarray]:
    """Samples [n, *shape] of a `LatentMixture` with K Gaussians, of which at most 20 are shown.

    Returns:
        each: 10 samples of each Gaussian, in a row. paths: 10 points from each Gaussian to the next, at one ε for all.
        triangle: where K is 3 or more, a 9 x 9 square whose lower left half lies between Gaussian `first`, on top, and
        the two after it, at the same ε; ones elsewhere.
    """
    k, generator = model.n_components, torch.Generator().manual_seed(seed)
    shown = [(first + j) % k for j in range(min(k, _MOST))]
    each = [model.sample(_OF_EACH, generator, component=j) for j in shown]
    noise = torch.randn(model.n_latent, generator=generator)
    ways = [model.interpolate(barycentric((j, (j + 1) % k), k, _STEPS), noise) for j in shown]
    found = {name: torch.cat(parts).reshape(-1, *shape).numpy() for name, parts in (("each", each), ("paths", ways))}
    if k >= 3:
        points = model.interpolate(barycentric((first, (first + 1) % k, (first + 2) % k), k, _ROWS), noise)
        sheet, at = np.ones((_ROWS, _ROWS, *shape), np.float32), np.tril_indices(_ROWS)
        sheet[at] = points.reshape(-1, *shape).numpy()
        found["triangle"] = sheet.reshape(-1, *shape)
    return found


def pictures(found: dict[str, np.ndarray]) -> dict[str, ReportFigure]:
    """Those of `drawn`, by its names."""
    told = {
        "each": ("Samples of each Gaussian", "A row for each Gaussian.", _OF_EACH),
        "paths": ("Ways between Gaussians", "Each row leads from a Gaussian to the next, at one ε for all.", _STEPS),
        "triangle": ("Three Gaussians", "Between three Gaussians, one at each corner, at one ε.", _ROWS),
    }
    shown = {}
    for name, x in found.items():
        title, caption, columns = told[name]
        shown[name] = ReportFigure(title, sample_grid(x, len(x) // columns, columns), caption, title)
    return shown


def section(model: LatentMixture, shape: tuple[int, ...]) -> ReportSection:
    """The report's part on a latent mixture."""
    return ReportSection(
        "Gaussians", "What the generator makes of each Gaussian.", list(pictures(drawn(model, shape, 0)).values())
    )


@torch.no_grad()
def traversal(model: LocalModel, component: int | None, seed: int) -> dict[str, bytes]:
    """Files of pictures by name: those of `drawn`, and for images a closed walk through the Gaussians.

    Raises:
        UserError: no such component.
    """
    network: Any = model.model
    shape, k, first = tuple(model.data["shape"]), network.n_components, component or 0
    if first >= k:
        raise UserError(f"component {first}: the model has components 0 to {k - 1}")
    shown = pictures(drawn(network, shape, seed, first))
    written = {_NAMES[name]: figure.png for name, figure in shown.items()}
    if is_image(shape) and k > 1:
        noise = torch.randn(network.n_latent, generator=torch.Generator().manual_seed(seed))
        stops = [(first + j) % k for j in range(min(k, _MOST))]
        ways = [barycentric(pair, k, _FRAMES + 1)[:-1] for pair in zip(stops, [*stops[1:], stops[0]])]
        frames = network.interpolate(torch.cat(ways), noise).reshape(-1, *shape).numpy()
        written["interpolation.gif"] = mixture_figures.animation(frames)
    return written
