"""How near an autoencoder's codes come to their prior, and the codes that pictures of it are decoded from.

Source: S. Kolouri et al., Sliced-Wasserstein Autoencoder, 2018 (sections 3 and 5). Imports only NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.metrics import checks

Draw = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class PriorDistance:
    """The squared sliced Wasserstein distance of n codes to the prior beside what n draws of the prior itself have.

    `squared` is the mean over `draws` sets of prior samples, `floor` the mean over `pairs` of two such sets each (with
    its standard error), all of n and over the same `projections`; in squared units of the code.
    """

    squared: float
    floor: float
    floor_error: float
    n: int
    draws: int
    pairs: int
    projections: int
    seed: int

    @property
    def ratio(self) -> float:
        """Distance over floor: about one where the codes are draws of the prior."""
        return self.squared / self.floor

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**asdict(self), "ratio": self.ratio}


def prior_distance(
    codes: np.ndarray, draw: Draw, *, draws: int = 5, pairs: int = 30, projections: int = 500, seed: int = 0
) -> PriorDistance:
    """SW₂² of codes [n, K] to a prior, of which `draw(n, seed)` gives samples [n, K], in float64.

    Directions are the normalised rows of `default_rng(seed).standard_normal((projections, K))`, the same for all sets.
    A single pair of sets of prior samples varies severalfold, which is why there are `pairs`.

    Raises:
        ValueError: codes that are not finite, fewer than two, or other sizes than the prior's.
    """
    codes, _ = checks.pair(codes, draw(2, seed), ("codes", "prior"))
    n, k = codes.shape
    directions = np.random.default_rng(seed).standard_normal((projections, k))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def projected(x: np.ndarray) -> np.ndarray:
        found = directions @ x.T.astype(np.float64)
        found.sort(axis=1)
        return found

    def drawn(number: int) -> np.ndarray:
        return projected(draw(n, seed + 1 + number))

    def squared(a: np.ndarray, b: np.ndarray) -> float:
        np.subtract(a, b, out=b)
        return float(np.vdot(b, b)) / b.size

    mine = projected(codes)
    found = [squared(mine, drawn(number)) for number in range(draws)]
    floor = np.array([squared(drawn(draws + 2 * i), drawn(draws + 2 * i + 1)) for i in range(pairs)])
    error = float(floor.std(ddof=1) / np.sqrt(pairs)) if pairs > 1 else float("nan")
    return PriorDistance(float(np.mean(found)), float(floor.mean()), error, n, draws, pairs, projections, seed)


def principal_walk(codes: np.ndarray, components: int = 10, sigmas: int = 3) -> np.ndarray:
    """Codes [components, 2 sigmas + 1, K] along the principal components of codes [n, K], from -sigmas to sigmas.

    Fewer components where the codes have fewer dimensions. Largest variance first; each points to where its largest
    coordinate is positive.
    """
    mean = codes.mean(0, dtype=np.float64)
    variances, axes = np.linalg.eigh(np.cov(codes.T.astype(np.float64)).reshape(len(mean), -1))
    axes = axes.T[::-1][:components]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    lengths = np.sqrt(np.maximum(variances[::-1][:components], 0))
    steps = np.arange(-sigmas, sigmas + 1)
    return (mean + steps[:, None] * (lengths[:, None] * axes)[:, None]).astype(np.float32)


def interpolations(first: np.ndarray, second: np.ndarray, steps: int = 9) -> np.ndarray:
    """Codes [n, steps, K] on the straight lines from codes `first` to `second`, both [n, K], ends included."""
    share = np.linspace(0, 1, steps, dtype=np.float32)[:, None]
    return (1 - share) * first[:, None] + share * second[:, None]


def plane_grid(prior_samples: np.ndarray, side: int = 25) -> np.ndarray:
    """A grid of codes [side², 2] over the plane, row by row from the top, as wide as the prior's samples [n, 2].

    All but one in two hundred of them at each side of each coordinate: for priors on [-1, 1]², about that square.
    """
    low, high = np.quantile(prior_samples, [0.005, 0.995], axis=0)
    across, down = np.linspace(low[0], high[0], side), np.linspace(high[1], low[1], side)
    return np.stack([np.tile(across, side), np.repeat(down, side)], 1).astype(np.float32)


def shifted_uniforms(shifts: np.ndarray, width: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """W₁ and JS (nats) between a uniform density of this width and itself shifted by τ, for τ [n] (figure 6).

    W₁ = |τ|. JS = KL(p, (p + q) / 2) + KL(q, (p + q) / 2), as in the paper's supplement, is 2 log 2 for each part of
    the mass that does not overlap, and does not grow once none does.
    """
    distance = np.abs(shifts)
    return distance, 2 * np.log(2) * np.minimum(distance / width, 1)
