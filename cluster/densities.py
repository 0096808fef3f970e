"""Log-likelihoods of any samples under a density: in the space that it is a density of, and by all workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.models import LocalModel, open_model
from data.errors import UserError
from data.partitions import Partitions, Piece
from data.pixels import scale
from eval.drawn import DrawnPartitions
from eval.likelihood import LogLikelihood, of_moments
from eval.measure import View
from eval.observed import Spread
from eval.scores import Score

if TYPE_CHECKING:
    from cluster.scoring import Runner


@dataclass(frozen=True)
class DensityOption:
    """A density that samples are judged by: models:/NAME@ALIAS or a run's folder; `seed` is that of the noise."""

    place: str
    tracking_uri: str | None = None
    seed: int = 0

    def model(self) -> LocalModel:
        """Opened once in a process.

        Raises:
            UserError: no model there, or no density.
        """
        return _opened(self.place, self.tracking_uri)

    def facts(self) -> dict[str, Any]:
        """For protocols."""
        return {"density": self.place, "density_model": self.model().fingerprint, "density_seed": self.seed}

    def of(self, partitions: Partitions, piece: Piece) -> tuple[np.ndarray, np.ndarray | None]:
        """log p(x) in nats [n] float64 of a piece, and the most probable component [n] where there are components.

        Raises:
            UserError: as `in_space`.
        """
        model = self.model()
        x = in_space(model, partitions, piece, self.seed)
        if not hasattr(model.model, "component_log_prob"):
            return model.log_prob(x), None
        joint = model.component_log_prob(x)
        return np.logaddexp.reduce(joint, axis=1), joint.argmax(1)


@functools.lru_cache(maxsize=2)
def _opened(place: str, tracking_uri: str | None) -> LocalModel:
    model = open_model(place, tracking_uri)
    model.require("log_prob")
    return model


def in_space(model: LocalModel, partitions: Partitions, piece: Piece, seed: int) -> np.ndarray:
    """Samples [n, *shape] float32 on the scale that the model is a density of: dequantised, where it is one of pixels.

    A channel axis of one is added, or left out.

    Raises:
        UserError: samples of another shape, or with another number of levels.
    """
    name, shape, levels = partitions.name, tuple(model.data["shape"]), model.data["levels"]
    found_shape = tuple(piece.x.shape[1:])
    if found_shape != shape and shape in ((*found_shape, 1), found_shape[:-1] * (found_shape[-1:] == (1,))):
        piece = replace(piece, x=piece.x.reshape(-1, *shape))  # a channel axis of one, more or less
    elif found_shape != shape:
        raise UserError(
            f"{name}: samples of shape {list(found_shape)}, the model was trained on {list(shape)}: give such samples"
        )
    if levels is None:
        return scale(piece.x, partitions.levels)
    found = partitions.levels
    if isinstance(partitions, DrawnPartitions) and partitions.grid is not None:
        found = partitions.grid
        piece = replace(piece, x=np.rint(piece.x * (found - 1)).astype(np.uint8))
    if found != levels:
        kind = "real numbers" if found is None else f"pixels of {found} levels"
        raise UserError(f"{name}: {kind}, the model is a density of pixels of {levels} levels: give such images")
    return piece.dequantised(levels, seed)


def log_likelihood(
    runner: Runner, partitions: Partitions, density: DensityOption, advance: Callable[..., Any]
) -> LogLikelihood:
    """Of all samples of a set, by all workers.

    Raises:
        UserError: as `in_space`; fewer than two samples, or likelihoods that are not finite.
    """
    seen, done = Spread(1), 0
    for part in runner.map(_part, partitions, density):
        if part.n:
            seen.merge(part)
        done += part.n
        advance(done, total=partitions.n)
    levels, shape = (density.model().data[name] for name in ("levels", "shape"))
    dimensions = None if levels is None else math.prod(shape)
    mean, squares = float(seen.mean[0]), float(seen.squares[0])
    return of_moments(seen.n, mean, squares, n_dimensions=dimensions, levels=levels or 256)


def _part(partitions: Partitions, number: int, view: View, density: DensityOption) -> Spread:
    seen = Spread(1)
    for piece in partitions.pieces(number):
        values = density.of(partitions, piece)[0]
        part = Spread(1)
        part.n, part.mean = len(values), values.mean(keepdims=True)
        part.squares = np.square(values - part.mean).sum(keepdims=True)
        seen.merge(part)
    return seen


def likelihood_scores(found: LogLikelihood, density: DensityOption) -> list[Score]:
    """For the table of scores."""
    words = f"nats, {found.n:,} samples under {density.place}"
    scores = [Score("log-likelihood", found.mean, found.standard_error, "higher", words, found.to_dict())]
    if found.bits_per_dimension is not None:
        words = f"dequantised pixels under {density.place}"
        scores.append(Score("bits per dimension", found.bits_per_dimension, None, "lower", words))
    return scores
