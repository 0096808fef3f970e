"""The prior of an autoencoder's codes, as a recipe names it, and a user's own brought into the model."""

from __future__ import annotations

import importlib
import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from data import storage
from data.errors import UserError, one_line
from trainer.settings import Settings

if TYPE_CHECKING:
    from trainer.models.priors import Prior

_PLANE = ("ring", "disc", "square", "bowl")
_NAMED = (*_PLANE, "uniform", "gaussian", "mixture")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# Draws of a user's function that the model keeps in its place; fewer of long codes.
_MOST_POINTS, _FEWEST_POINTS, _MOST_VALUES = 65_536, 4096, 1 << 22


class PriorSettings(Settings):
    """The distribution that codes are shaped to; its kind alone may stand for it, as in `prior: ring`."""

    kind: str = Field(
        "gaussian",
        description="ring, disc, square or bowl (of two dimensions), uniform, gaussian, mixture; FILE.npy of samples; "
        "or package.module.function, called as function(n, numpy_generator)",
    )
    means: list[list[float]] | None = Field(None, description="mixture: means of its Gaussians, a list of codes")
    spreads: list[float] | None = Field(None, description="mixture: their standard deviations; null: all one")
    weights: list[float] | None = Field(None, description="mixture: their weights; null: all the same")

    @model_validator(mode="before")
    @classmethod
    def _by_kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("kind")
    @classmethod
    def _for_all_workers(cls, kind: str) -> str:
        return storage.check_url(kind) if kind.endswith(".npy") else kind

    @model_validator(mode="after")
    def _is_known(self) -> PriorSettings:
        if self.kind not in _NAMED and not self.is_file and not _DOTTED.fullmatch(self.kind):
            raise ValueError(
                f"choose one of {', '.join(_NAMED)}, a FILE.npy of samples, or package.module.function for the prior"
            )
        means, spreads, weights = self.means, self.spreads, self.weights
        if self.kind != "mixture":
            if means or spreads or weights:
                raise ValueError(f"means, spreads and weights are of the prior mixture: leave them out of {self.kind}")
            return self
        if not means or not means[0] or len({len(mean) for mean in means}) > 1:
            raise ValueError("a mixture needs means, as [[-1, 0], [1, 0]]")
        for name, values in (("spreads", spreads), ("weights", weights)):
            if values is not None and (len(values) != len(means) or min(values) <= 0):
                raise ValueError(f"a mixture of {len(means)} means needs as many {name}, all above 0")
        return self

    @property
    def is_file(self) -> bool:
        """Whether it is a file of samples."""
        return self.kind.endswith(".npy")

    @property
    def label(self) -> str:
        """For tables."""
        return self.kind.rpartition("/")[2] if self.is_file else self.kind

    def check_dimension(self, n_latent: int) -> None:
        """Raises ValueError where the prior is not of so many dimensions; of a user's own `points` tells."""
        of = 2 if self.kind in _PLANE else len(self.means[0]) if self.means else n_latent
        if of != n_latent:
            raise ValueError(f"the prior {self.kind} has {of} dimensions, the code {n_latent}: set model.n_latent={of}")

    def points(self, n_latent: int) -> np.ndarray | None:
        """Samples [m, n_latent] float32 of a user's own prior: the file's, or draws of the function; else None.

        Raises:
            UserError: it cannot be read or called, or gives no finite samples of so many dimensions.
        """
        if self.kind in _NAMED:
            return None
        found = _read(self.kind) if self.is_file else _drawn(self.kind, n_latent)
        if found.ndim != 2 or found.dtype.kind not in "fiu" or len(found) < 2:
            raise UserError(
                f"prior {self.kind}: gives {found.dtype} of shape {list(found.shape)} instead of numbers [n, K], n >= 2"
            )
        if found.shape[1] != n_latent:
            raise UserError(
                f"prior {self.kind}: has {found.shape[1]} dimensions, the code {n_latent}: set "
                f"model.n_latent={found.shape[1]}, or give another prior"
            )
        if found.size > _MOST_VALUES:
            raise UserError(
                f"prior {self.kind}: all of {len(found):,} samples of {n_latent} dimensions would become part of the "
                f"model: give {_MOST_VALUES // n_latent:,} at most"
            )
        found = found.astype(np.float32)
        if not np.isfinite(found).all():
            rows = int((~np.isfinite(found)).any(1).sum())
            raise UserError(f"prior {self.kind}: {rows} of {len(found)} samples hold NaN or infinite values: repair it")
        if (found == found[0]).all():
            raise UserError(f"prior {self.kind}: all {len(found)} samples are one point: give a distribution")
        return found

    def config(self, points: np.ndarray | None) -> dict[str, Any]:
        """The arguments of the model's `Prior`, where `points` are those of `self.points`; `fill` gives it the rest."""
        if points is not None:
            return {"kind": "samples", "size": len(points)}
        return {"kind": self.kind, "size": len(self.means or ())}

    def fill(self, prior: Prior, points: np.ndarray | None) -> None:
        """Gives the model's prior its numbers."""
        import torch

        if points is not None:
            prior.set_samples(torch.from_numpy(points))
        if self.means:
            ones = [1.0] * len(self.means)
            prior.set_mixture(*map(torch.tensor, (self.means, self.spreads or ones, self.weights or ones)))


def _read(place: str) -> np.ndarray:
    content = storage.read_bytes(place)
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"prior {place}: no .npy file of numbers ({one_line(error)}): save one by numpy.save"
        ) from error
    return np.asarray(found)


def _drawn(name: str, n_latent: int) -> np.ndarray:
    """Draws of a user's function: always the same, where it draws by the generator that it is given."""
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"prior {name}: cannot be imported ({one_line(error)}): put its module on PYTHONPATH and name its function"
        ) from error
    n = max(_FEWEST_POINTS, min(_MOST_POINTS, _MOST_VALUES // n_latent))
    try:
        found = np.asarray(function(n, np.random.default_rng(0)))
    except Exception as error:  # whatever a user's function stumbles over
        raise UserError(f"prior {name}: fails ({type(error).__name__}: {one_line(error)}): repair it") from error
    if found.shape[:1] != (n,):
        raise UserError(f"prior {name}: gives an array of shape {list(found.shape)} for n = {n}: return [n, K]")
    return found
