"""Samples that a model draws while they are judged: nothing is stored, every partition has a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from data.partitions import Partitions, Piece
from data.pixels import quantise

# Values of a partition, about.
_PARTITION_VALUES = 4 << 20


class Density(Protocol):
    """What is judged: log-densities in nats and samples, as NumPy arrays over flattened samples [n, d]."""

    def log_prob(self, x: np.ndarray) -> np.ndarray: ...

    def sample(self, n: int, seed: int) -> np.ndarray: ...


class DrawnPartitions(Partitions):
    """n samples [n, *shape] of a model; the same for the same seed, however many workers draw them.

    Args:
        opened: gives the model; called where the samples are drawn, so that a worker opens its own.
        identity: what tells this model from others (its fingerprint, or its name).
        shape: of a sample.
        levels: number of values of a pixel onto which samples are put back; None leaves real numbers.
    """

    def __init__(
        self,
        opened: Callable[[], Density],
        n: int,
        seed: int,
        *,
        name: str,
        identity: str,
        shape: tuple[int, ...],
        levels: int | None,
    ) -> None:
        self.opened, self.seed, self.name, self.shape, self.grid = opened, seed, name, shape, levels
        self.levels = None
        self.scale = "as drawn" if levels is None else f"drawn, put back on {levels} levels / {levels - 1}"
        step = max(1, min(8192, _PARTITION_VALUES // math.prod(shape)))
        self.sizes = [min(step, n - start) for start in range(0, n, step)]
        self.keys = [f"{identity} {seed} {number}" for number in range(len(self.sizes))]

    def pieces(self, number: int) -> Iterator[Piece]:
        n = (self.sizes or [])[number]
        # One seed for each partition, of 32 bits: scikit-learn takes no more.
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        x = quantise(np.asarray(self.opened().sample(n, seed)), self.grid).reshape(n, *self.shape)
        yield Piece(x, None, 0, lambda: [f"{self.seed}/{number}/{row}" for row in range(n)])
