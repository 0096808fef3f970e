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


class Sampler(Protocol):
    """What draws samples, as NumPy arrays [n, d] or [n, *shape]."""

    def sample(self, n: int, seed: int) -> np.ndarray: ...


class Generator(Sampler, Protocol):
    """What is judged: it draws samples, and where `is_density`, it has log-densities in nats of them [n, d] as well."""

    @property
    def is_density(self) -> bool: ...

    def log_prob(self, x: np.ndarray) -> np.ndarray: ...


class DrawnPartitions(Partitions):
    """n samples [n, *shape] of a model; the same for the same seed, however many workers draw them.

    Args:
        opened: gives the model; called where the samples are drawn, so that a worker opens its own.
        identity: what tells this model from others: a fingerprint of its weights (or, where nothing is stored, a name).
        shape: of a sample.
        levels: number of values of a pixel onto which samples are put back; None leaves real numbers.
    """

    def __init__(
        self,
        opened: Callable[[], Sampler],
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
        self.facts = {"model": identity, "draws": n, "seed": seed, "levels": levels}
        step = max(1, min(8192, _PARTITION_VALUES // math.prod(shape)))
        self.sizes = [min(step, n - start) for start in range(0, n, step)]
        self.seeds = [f"drawn {seed} {number} {rows}" for number, rows in enumerate(self.sizes)]
        self.keys = [f"{identity} {shape} {levels} {drawn}" for drawn in self.seeds]

    def pieces(self, number: int) -> Iterator[Piece]:
        n = (self.sizes or [])[number]
        drawn = self.opened().sample(n, partition_seed(self.seed, number))
        x = quantise(np.asarray(drawn), self.grid).reshape(n, *self.shape)
        yield Piece(x, None, 0, lambda: [f"{self.seed}/{number}/{row}" for row in range(n)])


def partition_seed(seed: int, number: int) -> int:
    """64 bits; no two partitions of a set share even the lower 32, which are all that PyTorch takes on a CPU.

    Those are the finaliser of MurmurHash3, which maps 32 bits one to one, of consecutive numbers.
    """
    first, upper = (int(word) for word in np.random.SeedSequence([seed, 0]).generate_state(2))
    low = (first + number) & 0xFFFFFFFF
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (1, 16)):
        low = ((low ^ (low >> shift)) * factor) & 0xFFFFFFFF
    return upper << 32 | low
