"""What evaluation sees of a set of samples, block by block, and the statistics that every evaluation needs of it."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from data import kmeans
from data.errors import UserError
from data.limits import MAX_MAGNITUDE
from data.partitions import position
from eval.metrics.hashing import GOLDEN, splitmix64

PIXELS = "pixels"
# Labels beyond are no classes but numbers of something else.
MAX_CLASSES = 1_000_000


@dataclass(frozen=True, eq=False)
class Space:
    """Where distances are measured: the samples' own values, or the features of an extractor, named by its content."""

    name: str = PIXELS
    fingerprint: str = PIXELS

    def __eq__(self, other: object) -> bool:
        """Whether features are the same numbers, whatever their file is called.

        The kind counts, as one file may be read in several ways, and a module's function.
        """
        return isinstance(other, Space) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[str, str, str]:
        kind, _, rest = self.name.partition(":")
        return self.fingerprint, kind, rest.rpartition(":")[2] if kind == "module" else ""


# Who labelled samples that bring their labels.
GIVEN = Space("given", "given")


@dataclass(frozen=True)
class Observed:
    """One block of samples.

    Attributes:
        x: [n, *shape] float32, on the scale of the scores.
        features: [n, d] float32, where distances are measured: the flattened samples, or what an extractor makes of
            them.
        ids: [n] uint64, random numbers that belong to the samples: the same whoever reads them.
        positions: [n] int64, ordered as the set is (see `data.partitions.position`).
        labels: [n] int64, negative where there is none; or None.
        probabilities: [n, n_classes] float32 of a classifier, or None.
        labelled_by: whose classes count: the classifier's where there are probabilities, else `GIVEN`; None: untold.
        of_labels: whether the classifier's classes are the labels.
    """

    x: np.ndarray
    features: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    labelled_by: Space | None = None
    of_labels: bool = False


class Observer(Protocol):
    """What a pass over a set fills: it takes what it needs of a block by itself, and merges with its like.

    What it holds is a pure function of the samples that it has seen (up to rounding), whatever the blocks, their order
    and how many workers shared them. Where its state may be kept (see `eval.stored`) an observer also has

        identity() -> str: what its state depends on beside the samples;
        arrays() -> dict[str, np.ndarray]: the whole state, of one partition;
        restored(arrays, number) -> Self: of that state, of the partition that is number `number` now.
    """

    def observe(self, seen: Observed) -> None:
        """Takes in one block."""
        ...

    def merge(self, other: Self) -> None:
        """Takes in what another one has seen."""
        ...


def moved(positions: np.ndarray, number: int) -> np.ndarray:
    """Positions [n] of one partition, as they are where it is number `number`."""
    return position(number, positions & 0xFFFFFFFF)


# A sketch that is given no number holds no more than this.
_SKETCHED_BYTES = 1 << 30

# One pass over a set: every observer, empty at first, comes back having seen all of it.
Pass = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def sample_ids(seed: str, n: int, start: int = 0) -> np.ndarray:
    """Random numbers [n] uint64 for samples start, start + 1, ... of the partition that has this seed."""
    first = np.uint64(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        return splitmix64(first + np.arange(start, start + n, dtype=np.uint64) * GOLDEN)


class Digest:
    """A fingerprint of the values, for sets that bring none of their own."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}

    def observe(self, seen: Observed) -> None:
        number = int(seen.positions[0] >> 32)
        before = self.parts.get(number, repr(seen.x.shape[1:]).encode())
        self.parts[number] = hashlib.sha256(before + np.ascontiguousarray(seen.x).tobytes()).digest()

    def merge(self, other: Self) -> None:
        self.parts.update(other.parts)

    def identity(self) -> str:
        """What else it depends on."""
        return "digest"

    def arrays(self) -> dict[str, np.ndarray]:
        """The state, of one partition."""
        return {"digest": np.frombuffer(b"".join(self.parts.values()), np.uint8)}

    def restored(self, arrays: Mapping[str, np.ndarray], number: int) -> Digest:
        """Of that state, of the partition that is number `number` now."""
        found = Digest()
        found.parts = {number: arrays["digest"].tobytes()}
        return found

    def hexdigest(self) -> str:
        """SHA-256 over all partitions."""
        return hashlib.sha256(b"".join(self.parts[number] for number in sorted(self.parts))).hexdigest()


class Extent:
    """How many samples, of which shape, and how large their values are.

    Smallest and largest value and mean square are taken over the samples of every block that `rows` allows.
    """

    def __init__(self, rows: int = 1024) -> None:
        self.rows = rows
        self.n = 0
        self.shape: tuple[int, ...] | None = None
        self.low, self.high = math.inf, -math.inf
        self.n_values, self.sum_of_squares = 0, 0.0

    @property
    def root_mean_square(self) -> float:
        """Over samples and features."""
        return math.sqrt(self.sum_of_squares / self.n_values) if self.n_values else 0.0

    def observe(self, seen: Observed) -> None:
        """Takes in one block; raises UserError for values that cannot be computed with."""
        x = seen.x[:: -(-len(seen.x) // self.rows)]
        low, high = float(x.min()), float(x.max())  # NaN, where there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError("the samples hold NaN or infinite values: remove them first")
        if max(abs(low), abs(high)) > MAX_MAGNITUDE:
            raise UserError(f"the samples hold values beyond {MAX_MAGNITUDE:g} in size: rescale them first")
        self._take(seen.x.shape[1:], len(seen.x), low, high, x.size, float(np.square(x, dtype=np.float64).sum()))

    def merge(self, other: Self) -> None:
        if other.shape is not None:
            self._take(other.shape, other.n, other.low, other.high, other.n_values, other.sum_of_squares)

    def _take(self, shape: tuple[int, ...], n: int, low: float, high: float, values: int, squares: float) -> None:
        if self.shape not in (None, shape):
            raise UserError(f"samples of shape {self.shape} and of {shape} in one set: bring them to one shape")
        self.shape, self.n = shape, self.n + n
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.n_values, self.sum_of_squares = self.n_values + values, self.sum_of_squares + squares

    def arrays(self) -> dict[str, np.ndarray]:
        numbers = [self.low, self.high, self.sum_of_squares]
        whole = [self.rows, self.n, self.n_values, *(self.shape or ())]
        return {"numbers": np.array(numbers), "whole": np.array(whole, np.int64)}

    def identity(self) -> str:
        """What else it depends on."""
        return f"extent {self.rows}"

    def restored(self, arrays: Mapping[str, np.ndarray], number: int) -> Extent:
        """Of that state."""
        rows, n, n_values, *shape = arrays["whole"].tolist()
        found = Extent(rows)
        found.n, found.n_values, found.shape = n, n_values, tuple(shape) or None
        found.low, found.high, found.sum_of_squares = arrays["numbers"].tolist()
        return found


class Spread:
    """Mean and variance of every feature, in float64 (Chan, Golub and LeVeque 1983 for the merging)."""

    def __init__(self, n_features: int = 0) -> None:
        self.n = 0
        self.mean = np.zeros(n_features)
        self.squares = np.zeros(n_features)

    def observe(self, seen: Observed) -> None:
        """Takes in one block; raises UserError for values that cannot be computed with."""
        x = seen.features
        part = Spread(x.shape[1])
        part.n, part.mean = len(x), x.mean(axis=0, dtype=np.float64)
        if not np.isfinite(part.mean).all():
            raise UserError("the samples hold NaN or infinite values: remove them first")
        part.squares = np.square(x - part.mean).sum(axis=0)
        self.merge(part)

    def merge(self, other: Spread) -> None:
        if not self.n:
            self.n, self.mean, self.squares = other.n, other.mean.copy(), other.squares.copy()
            return
        n = self.n + other.n
        gap = other.mean - self.mean
        self.mean = self.mean + gap * (other.n / n)
        self.squares = self.squares + other.squares + gap**2 * (self.n * other.n / n)
        self.n = n

    def std(self) -> np.ndarray:
        """Standard deviation [d] float32 of every feature, 1 where it is constant up to float32 rounding."""
        std = np.sqrt(self.squares / max(1, self.n))
        return np.where(std > np.finfo(np.float32).eps * np.abs(self.mean), std, 1.0).astype(np.float32)


class Sketch:
    """A uniform random subset of the set: the samples with the smallest random numbers.

    Args:
        capacity: so many samples at most; None: as many as fit into 1 GiB.
        n: of the whole set, where it is known: parts of it then keep little more than their share.
        seed: another seed gives another subset.
    """

    def __init__(self, capacity: int | None, n: int | None = None, seed: int = 0) -> None:
        self.capacity, self.n, self.seed = capacity, n, seed
        self.threshold: np.uint64 | None = None
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.held = 0

    def observe(self, seen: Observed) -> None:
        if self.threshold is None:
            m = self.capacity or max(1, _SKETCHED_BYTES // (4 * max(1, seen.features.shape[1])))
            # In the whole set, six standard deviations more than the capacity lie below.
            share = 1.0 if self.n is None else min(1.0, (m + 6 * math.sqrt(m) + 36) / max(1, self.n))
            self.capacity, self.threshold = m, np.uint64(min(2**64 - 1, int(share * 2**64)))
        numbers = splitmix64(seen.ids + np.uint64(self.seed)) if self.seed else seen.ids
        rows = numbers <= self.threshold
        if rows.any():
            self._add(numbers[rows], seen.positions[rows], seen.features[rows])

    def merge(self, other: Self) -> None:
        self.capacity = self.capacity or other.capacity
        for part in other.parts:
            self._add(*part)

    def features(self) -> np.ndarray:
        """[m, d], in the order of the set."""
        return self._final()[2]

    def positions(self) -> np.ndarray:
        """[m], rising."""
        return self._final()[1]

    def least(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Features [m, d] and positions [m] of a smaller random subset."""
        numbers, positions, features = self._final()
        chosen = np.sort(np.argsort(numbers, kind="stable")[:m])
        return features[chosen], positions[chosen]

    def arrays(self) -> dict[str, np.ndarray]:
        self._prune()
        names = ("numbers", "positions", "features")
        found = dict(zip(names, self.parts[0])) if self.parts else {}
        return {**found, "settings": np.array([self.capacity or 0, self.seed], np.int64)}

    def identity(self) -> str:
        """What else it depends on."""
        return f"subset {self.capacity} {self.n} {self.seed}"

    def restored(self, arrays: Mapping[str, np.ndarray], number: int) -> Sketch:
        """Of that state, of the partition that is number `number` now."""
        found = Sketch.from_arrays(arrays)
        found.parts = [(numbers, moved(places, number), x) for numbers, places, x in found.parts]
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        capacity, seed = arrays["settings"].tolist()
        found = cls(capacity or None, seed=seed)
        if "numbers" in arrays:
            found._add(arrays["numbers"], arrays["positions"], arrays["features"])
        return found

    def _add(self, *part: np.ndarray) -> None:
        self.parts.append((part[0], part[1], part[2]))
        self.held += len(part[0])
        if self.capacity and self.held > 2 * self.capacity:
            self._prune()

    def _prune(self) -> None:
        """Leaves one part of at most `capacity` samples."""
        if not self.parts:
            return
        numbers, positions, features = (np.concatenate(arrays) for arrays in zip(*self.parts))
        if self.capacity and len(numbers) > self.capacity:
            kept = np.sort(np.lexsort((positions, numbers))[: self.capacity])
            numbers, positions, features = numbers[kept], positions[kept], features[kept]
        self.parts, self.held = [(numbers, positions, features)], len(numbers)

    def _final(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._prune()
        if not self.parts:
            raise UserError("no samples there: check the path and the split")
        numbers, positions, features = self.parts[0]
        order = np.argsort(positions, kind="stable")
        return numbers[order], positions[order], features[order]


class Nearest:
    """The nearest sample of the set to each of some queries [m, d], by squared Euclidean distance."""

    def __init__(self, queries: np.ndarray) -> None:
        self.queries = queries
        self.distances = np.full(len(queries), np.inf)
        self.positions = np.full(len(queries), -1, np.int64)

    def observe(self, seen: Observed) -> None:
        nearest, _ = kmeans.assign(self.queries, seen.features)
        # FAISS expands the square, which leaves nothing of the distance to a copy: the winners are measured exactly.
        gaps = self.queries - seen.features[nearest].astype(np.float64)
        self._take(np.einsum("nd,nd->n", gaps, gaps), seen.positions[nearest])

    def merge(self, other: Self) -> None:
        self._take(other.distances, other.positions)

    def found(self) -> Nearest:
        """Without the queries."""
        light = copy.copy(self)
        light.queries = self.queries[:0]
        return light

    def _take(self, distances: np.ndarray, positions: np.ndarray) -> None:
        nearer = distances < self.distances
        self.distances = np.where(nearer, distances, self.distances)
        self.positions = np.where(nearer, positions, self.positions)
