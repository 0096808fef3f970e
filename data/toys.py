"""Toy distributions in the plane, of which everything is known: their samples, components and densities."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from data.errors import UserError

_MOST_SAMPLES, _MOST_COMPONENTS, _MOST_TURNS = 10**8, 10_000, 1000
# Points of the curve per unit of its noise, over which the swiss roll's density is summed up.
_POINTS = 4
_CHUNK = 2**22


class Toy(Protocol):
    """A distribution in the plane."""

    @property
    def samples(self) -> int:
        """How many samples a source draws."""
        ...

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Samples [n, 2] float32 and the components [n] int64 that they come from."""
        ...

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """log p(x) in nats, [n] float64, for x [n, 2]."""
        ...


@dataclass(frozen=True)
class Ring:
    """Gaussians of equal weight with covariance `variance` I, equally spaced on a circle (thesis §5.1.1).

    With `centre` there is one more in the middle of the circle, the component of the highest number.
    """

    components: int = 6
    radius: float = 5.0
    variance: float = 0.1
    centre: bool = False
    samples: int = 60_000

    def __post_init__(self) -> None:
        if not (1 <= self.components <= _MOST_COMPONENTS and self.variance > 0):
            raise ValueError(f"components must be 1 to {_MOST_COMPONENTS}, variance above 0")

    @property
    def means(self) -> np.ndarray:
        """Means of the components, [T, 2] float64."""
        angles = 2 * np.pi * np.arange(self.components) / self.components
        ring = self.radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return np.concatenate([ring, np.zeros((1, 2))]) if self.centre else ring

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        means = self.means
        labels = rng.integers(len(means), size=n)
        noise = rng.normal(0.0, math.sqrt(self.variance), (n, 2))
        return (means[labels] + noise).astype(np.float32), labels

    def log_density(self, x: np.ndarray) -> np.ndarray:
        means = self.means
        return _mixture(x, means, self.variance) - math.log(len(means))


@dataclass(frozen=True)
class SwissRoll:
    """A spiral (t cos t, t sin t) with Gaussian noise, t uniform over `turns` turns from 3π/2 on; labels are turns.

    scikit-learn's has one turn and a half.
    """

    turns: float = 3.0
    noise: float = 0.25
    samples: int = 60_000

    def __post_init__(self) -> None:
        if not (0 < self.turns <= _MOST_TURNS and self.noise > 0):
            raise ValueError(f"turns must be above 0 and at most {_MOST_TURNS}, noise above 0")

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        turn = rng.uniform(0.0, self.turns, n)
        noise = rng.normal(0.0, self.noise, (n, 2))
        return (self._curve(turn) + noise).astype(np.float32), turn.astype(np.int64)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        end = np.pi * (1.5 + 2 * self.turns)
        n_points = math.ceil(_POINTS * end * 2 * np.pi * self.turns / self.noise)
        points = self._curve((np.arange(n_points) + 0.5) / n_points * self.turns)
        return _mixture(x, points, self.noise**2) - math.log(n_points)

    def _curve(self, turn: np.ndarray) -> np.ndarray:
        t = np.pi * (1.5 + 2 * turn)
        return t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)


# The third is the data of the critics' figure (thesis §2.3.3, Figure 2.3: seven components).
TOYS: dict[str, Toy] = {"ring": Ring(), "swissroll": SwissRoll(), "seven": Ring(centre=True)}


def toy(spec: str) -> Toy:
    """The distribution that a spec names: `ring`, `ring:8`, `ring:components=8,radius=3`, `swissroll:turns=2`, `seven`.

    Raises:
        UserError: an unknown name or option, or a value that makes no distribution.
    """
    kind, _, text = spec.partition(":")
    default = TOYS.get(kind)
    if default is None:
        raise UserError(f"unknown toy {kind!r}: choose one of {', '.join(TOYS)}")
    # The protocol does not say that toys are dataclasses; they all are.
    known = {field.name: type(getattr(default, field.name)) for field in fields(default)}  # type: ignore[arg-type]
    values = {name: getattr(default, name) for name in known}
    for part in filter(None, text.split(",")):
        name, sign, value = part.partition("=")
        if not sign:  # a number alone is the first option
            name, value = next(iter(known)), part
        if name not in known:
            raise UserError(f"{spec}: {name!r} is no option of {kind}: choose of {', '.join(known)}")
        try:
            values[name] = known[name](float(value)) if math.isfinite(float(value)) else None
            if values[name] is None or values[name] != float(value):
                raise ValueError("not such a number")
        except ValueError as error:
            raise UserError(f"{spec}: {name} is {value!r}: give a finite number (a whole one for a count)") from error
    if not 2 <= values["samples"] <= _MOST_SAMPLES:
        raise UserError(f"{spec}: samples is {values['samples']}: choose 2 to {_MOST_SAMPLES}")
    try:
        return type(default)(**values)
    except ValueError as error:
        raise UserError(f"{spec}: {error}") from error


def _mixture(x: np.ndarray, means: np.ndarray, variance: float) -> np.ndarray:
    """log Σ_k N(x; means_k, variance I), [n] float64."""
    out = np.empty(len(x))
    rows = max(1, _CHUNK // len(means))
    for start in range(0, len(x), rows):
        part = x[start : start + rows].astype(np.float64)
        squares = ((part[:, None] - means) ** 2).sum(-1) / (-2 * variance)
        out[start : start + rows] = np.logaddexp.reduce(squares, axis=1)
    return out - math.log(2 * np.pi * variance)
