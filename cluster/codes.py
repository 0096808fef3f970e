"""What an autoencoder has learnt: how near its codes are to the prior, what it rebuilds, and pictures of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.models import LocalAutoencoder
from data.errors import UserError
from data.manifest import Manifest
from data.stream import read_blocks
from eval import code_figures, codes, mixture_figures
from eval.canvas import is_image
from eval.codes import PriorDistance
from eval.report import ReportFigure, ReportSection, ReportTable
from trainer.settings import TEST_SPLIT

MOST = 10_000  # codes that are compared with the prior
_SHOWN, _PAIRS, _STEPS, _SIDE = 12, 6, 9, 25
_NOISE = 13  # first word of the key of a stochastic encoder's noise


@dataclass(frozen=True)
class CodeMeasures:
    """Of the first `MOST` samples of a set, or all: see `measure`.

    Attributes:
        distance: of the codes to the prior; of a stochastic encoder's codes with their noise.
        squared_error, absolute_error: means over samples and pixels (features) of (x - x̂)² and |x - x̂|.
        codes: [n, K] float32, without noise.
        labels: [n], or None.
        shown: the first samples [m, *shape].
    """

    distance: PriorDistance
    squared_error: float
    absolute_error: float
    codes: np.ndarray
    labels: np.ndarray | None
    shown: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        """For MLflow and the registry."""
        return {
            "prior_distance": self.distance.squared,
            "prior_distance_floor": self.distance.floor,
            "prior_distance_ratio": self.distance.ratio,
            "reconstruction_mse": self.squared_error,
            "reconstruction_mae": self.absolute_error,
        }


def measure(model: LocalAutoencoder, samples: Iterable[dict[str, np.ndarray]], *, seed: int = 0) -> CodeMeasures:
    """Passes over samples {"x": [n, *shape] (images in [0, 1]), perhaps "label": [n]}, to the first `MOST` samples.

    The distance is that of `eval.codes.prior_distance`: 500 shared directions, 5 draws of the prior, a floor of 30
    pairs. The reconstruction is of the code without noise.

    Raises:
        UserError: fewer than two samples.
    """
    network: Any = model.model
    noisy: list[np.ndarray] = []
    plain: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    shown: list[np.ndarray] = []
    squares, absolutes, values, done = 0.0, 0.0, 0, 0
    generator = torch.Generator().manual_seed(_NOISE + seed)
    for block in samples:
        x = block["x"][: MOST - done]
        if not len(x):
            break
        done += len(x)
        with torch.inference_mode():
            mean, log_variance = network.posterior(torch.from_numpy(np.ascontiguousarray(x, np.float32)))
        plain.append(mean.numpy())
        if network.stochastic:
            mean = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)
        noisy.append(mean.numpy())
        gap = model.decode(plain[-1]).astype(np.float64) - x
        squares += float(np.square(gap).sum())
        absolutes += float(np.abs(gap).sum())
        values += gap.size
        if "label" in block:
            labels.append(block["label"][: len(x)])
        if done - len(x) < 2 * _SHOWN:
            shown.append(x[: 2 * _SHOWN])
    if done < 2:
        raise UserError(f"{done} samples have no distribution to compare with the prior: give two or more")
    distance = codes.prior_distance(np.concatenate(noisy), model.prior_sample, seed=seed)
    return CodeMeasures(
        distance,
        squares / values,
        absolutes / values,
        np.concatenate(plain),
        np.concatenate(labels) if labels else None,
        np.concatenate(shown)[: 2 * _SHOWN],
    )


def held_out(manifest: Manifest) -> Iterator[dict[str, np.ndarray]]:
    """The test split of a pack, for `measure`."""
    return read_blocks(manifest, TEST_SPLIT)


def sections(
    model: LocalAutoencoder, found: CodeMeasures, class_names: Sequence[str] | None = None
) -> list[ReportSection]:
    """The report's part on codes: a table of the measures, and pictures."""
    d = found.distance
    rows: list[list[Any]] = [
        ["squared sliced Wasserstein distance of the codes to the prior", f"{d.squared:.3g}"],
        ["the same between draws of the prior (floor)", f"{d.floor:.3g} ± {d.floor_error:.1g}"],
        ["ratio", f"{d.ratio:.2f}"],
        ["reconstruction, mean squared error", f"{found.squared_error:.4g}"],
        ["reconstruction, mean absolute error", f"{found.absolute_error:.4g}"],
    ]
    note = (
        f"{d.n:,} test samples; {d.projections} shared directions, {d.draws} draws of the prior, floor of {d.pairs} "
        f"pairs, seed {d.seed}. Errors per pixel or feature, in units of the data."
    )
    table = ReportTable("Codes and reconstructions", ["measure", "value"], rows, note)
    drawn = pictures(model, found, class_names)
    return [ReportSection("Codes", "Where samples are encoded, and what is decoded from there.", drawn, table=table)]


def pictures(
    model: LocalAutoencoder, found: CodeMeasures, class_names: Sequence[str] | None = None
) -> list[ReportFigure]:
    """Codes over the prior, and reconstructions; of images also lines, principal components and, in 2-D, a grid."""
    shape, shown = tuple(model.data["shape"]), found.shown
    prior = model.prior_sample(len(found.codes), 0)
    rebuilt = model.decode(model.encode(shown))
    rows = [("samples", shown[:_SHOWN]), ("rebuilt", rebuilt[:_SHOWN])]
    figures = [
        ReportFigure(
            "Codes over the prior",
            code_figures.code_scatter(found.codes, found.labels, prior, class_names),
            "Draws of the prior (left and grey), and codes of test samples, coloured by their labels.",
            "Scatter of codes over their prior",
        ),
        ReportFigure(
            "Reconstructions",
            mixture_figures.rows_of_images(rows, "Test samples and their reconstructions"),
            "Above: samples of the test split; below: what the decoder makes of their codes.",
            "Reconstructions",
        ),
    ]
    if not is_image(shape):
        return figures
    half = min(len(shown) // 2, _PAIRS)
    walk = codes.principal_walk(found.codes)
    sigmas = [f"{step}σ".replace("-", "−") for step in range(-(walk.shape[1] // 2), walk.shape[1] // 2 + 1)]
    if half:
        figures.append(
            ReportFigure(
                "Interpolations",
                interpolation_sheet(model, shown[:half], shown[half : 2 * half]),
                "A sample, what is decoded along the straight line between two codes, and the other sample.",
                "Interpolations between pairs of test samples",
            )
        )
    figures.append(
        ReportFigure(
            "Principal components of the codes",
            code_figures.image_sheet(
                _decoded(model, walk),
                "Principal components of the codes",
                sigmas,
                [str(i + 1) for i in range(len(walk))],
            ),
            "From the mean code along each principal component, −3 to 3 standard deviations; largest variance above.",
            "Decoded walk along the principal components",
        )
    )
    if found.codes.shape[1] == 2:
        grid = codes.plane_grid(prior, _SIDE).reshape(_SIDE, _SIDE, 2)
        sheet = code_figures.image_sheet(_decoded(model, grid), f"A decoded grid of {_SIDE} x {_SIDE} codes")
        figures.append(
            ReportFigure("Decoded grid", sheet, "z₁ left to right, z₂ bottom to top.", "Decoded grid of codes")
        )
    return figures


def interpolation_sheet(model: LocalAutoencoder, first: np.ndarray, second: np.ndarray, steps: int = _STEPS) -> bytes:
    """Rows of first sample, decoded straight line of codes, second sample; samples [n, *shape] of images.

    Raises:
        UserError: samples that are not images.
    """
    between = _decoded(model, codes.interpolations(model.encode(first), model.encode(second), steps))
    rows = np.concatenate([first[:, None], between, second[:, None]], 1)
    marks = ["sample", *(f"{share:.2g}" for share in np.linspace(0, 1, steps)), "sample"]
    return code_figures.image_sheet(rows, "Along straight lines between codes", marks)


def _decoded(model: LocalAutoencoder, grid: np.ndarray) -> np.ndarray:
    """Samples [rows, columns, *shape] of codes [rows, columns, K]."""
    found = model.decode(grid.reshape(-1, grid.shape[-1]))
    return found.reshape(*grid.shape[:2], *found.shape[1:])
