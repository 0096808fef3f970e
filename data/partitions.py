"""Sets of samples of any size, cut into partitions that any process can read on its own, in constant memory.

The cut depends on the samples alone, never on how many workers share them, so that sums over partitions, taken in
their order, are the same to the bit on one worker and on a hundred.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import posixpath
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from data import images, storage
from data.errors import UserError
from data.foreign import expand_urls, read_webdataset
from data.manifest import MANIFEST, Manifest, ShardRecord, check_size, load_manifest
from data.members import read_member
from data.pixels import dequantise, scale
from data.sources import SPECS, Source, SourceOptions, is_spec, open_source
from data.stream import EVAL_NOISE

# Stored bytes of a partition, about; and rows of a piece of one.
_PARTITION_BYTES = 16 << 20
_PIECE_ROWS = 1024
_ROW_BITS = 32
# First word of the key of noise, where it is not that of a pack's blocks.
_NOISE = 11
# Where a pack's origin tells who gave the class probabilities in it.
CLASSIFIED = "probabilities_by"


@dataclass(frozen=True)
class Piece:
    """Some neighbouring samples of a partition.

    Attributes:
        x: [rows, *shape] as stored (uint8 or float32).
        label: [rows] int64, or None.
        start: place of the first row in its partition.
        keys: gives the name of every row, unique in the set.
        noise: words that key the noise of dequantisation, beside its seed.
        probabilities: [rows, n_classes] float32 of a classifier, where they are kept with the samples.
    """

    x: np.ndarray
    label: np.ndarray | None
    start: int
    keys: Callable[[], list[str]]
    noise: tuple[int, ...] = (_NOISE,)
    probabilities: np.ndarray | None = None

    def dequantised(self, levels: int, seed: int) -> np.ndarray:
        """The samples with noise in [0, 1), see `data.pixels.dequantise`: the same whoever reads them."""
        return dequantise(self.x, levels, [self.noise[0], seed, *self.noise[1:]])


class Partitions(ABC):
    """A set of samples in partitions.

    Attributes:
        name: of the set, for people.
        levels: number of values of a pixel; None for real numbers.
        scale: how values in [0, 1] are made of the stored ones, in words.
        shape: of a sample.
        keys: what identifies the content of each partition, as far as it is known without reading.
        seeds: what the random numbers of each partition's samples are made of: never a path or a time, so that whoever
            repeats an evaluation elsewhere draws the same subsets.
        lasting: whether a partition whose content changes gets another key for certain.
        facts: which of the options decided what is read: for protocols.
        sizes: samples of each partition; None where only reading tells.
        fingerprint: SHA-256 of the content, where it is known without reading; else None.
        classifier: name and fingerprint of what gave class probabilities that are kept with the samples, and whether
            its classes are the labels; None where none are kept.
        class_names: name of each label, where known.
    """

    name: str
    levels: int | None
    scale: str
    shape: tuple[int, ...]
    keys: Sequence[str]
    seeds: Sequence[str]
    facts: Mapping[str, Any]
    sizes: Sequence[int] | None
    lasting: bool = True
    fingerprint: str | None = None
    classifier: tuple[str, str, bool] | None = None
    class_names: Sequence[str] | None = None

    @abstractmethod
    def pieces(self, number: int) -> Iterator[Piece]:
        """The samples of one partition, in their order.

        Raises:
            UserError: damaged or missing data.
        """

    @property
    def n(self) -> int | None:
        """Samples in all, where known without reading."""
        return None if self.sizes is None else sum(self.sizes)

    def __len__(self) -> int:
        return len(self.keys)

    def only(self, number: int) -> Partitions:
        """What a process needs that reads partition `number` alone, under the same number: small, to be sent there."""
        one = copy.copy(self)
        one.keys, one.seeds = _one(self.keys, number), _one(self.seeds, number)
        one.sizes = None if self.sizes is None else _one(self.sizes, number)
        return one

    def first(self, n: int) -> np.ndarray:
        """The first n samples [n, *shape] on the scale of the scores; all of them where there are fewer.

        Raises:
            UserError: as `pieces`, or there are none.
        """
        found: list[np.ndarray] = []
        for number in range(len(self)):
            for piece in self.pieces(number):
                found.append(scale(piece.x[:n], self.levels))
                if sum(map(len, found)) >= n:
                    return np.concatenate(found)[:n]
        if not found:
            raise UserError(f"{self.name}: no samples there: check the path and the split")
        return np.concatenate(found)

    def fetch(self, positions: np.ndarray) -> np.ndarray:
        """Samples [n, *shape] on the scale of the scores, by their positions (see `position`), in that order.

        Raises:
            UserError: as `pieces`, or no sample is there.
        """
        found: dict[int, np.ndarray] = {}
        for places, piece, rows in self._at(positions):
            found.update(zip(places, scale(piece.x[rows], self.levels)))
        return np.stack(self._ordered(found, positions))

    def names(self, positions: np.ndarray) -> list[str]:
        """The keys of samples, by their positions, in that order.

        Raises:
            UserError: as `fetch`.
        """
        found: dict[int, str] = {}
        for places, piece, rows in self._at(positions):
            keys = piece.keys()
            found.update(zip(places, (keys[row] for row in rows)))
        return self._ordered(found, positions)

    def _at(self, positions: np.ndarray) -> Iterator[tuple[list[int], Piece, np.ndarray]]:
        """The pieces that hold these positions, with the positions and the rows in each."""
        numbers, below = positions >> _ROW_BITS, positions & ((1 << _ROW_BITS) - 1)
        for number in np.unique(numbers):
            rows = np.unique(below[numbers == number])
            for piece in self._pieces_with(int(number), rows):
                inside = rows[(rows >= piece.start) & (rows < piece.start + len(piece.x))]
                if len(inside):
                    yield position(int(number), inside).tolist(), piece, inside - piece.start
                if piece.start + len(piece.x) > rows[-1]:
                    break

    def _pieces_with(self, number: int, rows: np.ndarray) -> Iterator[Piece]:
        """The pieces of a partition that hold some of its rows [n], and perhaps others."""
        return self.pieces(number)

    def _ordered(self, found: dict[int, Any], positions: np.ndarray) -> list[Any]:
        try:
            return [found[place] for place in positions.tolist()]
        except KeyError:
            raise UserError(f"{self.name}: samples changed while they were read: run this again") from None


def _one(values: Sequence[Any], number: int) -> Any:
    """A sequence that has nothing but the item at `number`."""
    return {number: values[number]}


def _told_apart(seeds: Sequence[str]) -> list[str]:
    """Equal ones, such as those of a shard that comes twice, with how often they came before."""
    seen: Counter[str] = Counter()
    found = []
    for seed in seeds:
        found.append(f"{seed} {seen[seed]}" if seen[seed] else seed)
        seen[seed] += 1
    return found


def position(number: int, rows: np.ndarray) -> np.ndarray:
    """Where rows [n] of a partition stand in the whole set: int64, ordered as the set is."""
    return (np.int64(number) << _ROW_BITS) + rows.astype(np.int64)


def open_partitions(
    spec: str,
    *,
    split: str = "test",
    size: int | None = None,
    crop: images.Box | None = None,
    grey: bool | None = None,
    whole: bool = False,
) -> Partitions:
    """Opens a pack, third-party shards, a folder of images, an array, or a source.

    Args:
        spec: a folder with manifest.json (or that file), .tar files (braces allowed) or a folder of them, a folder
            of images, a .npy or .npz file, or a spec of `open_source`.
        split: of a pack or source; what has no splits is taken whole.
        size, crop, grey: for images in folders and third-party shards, as in `SourceOptions`.
        whole: a source without splits is taken whole too, and not the share of it that a pack would hold out.

    Raises:
        UserError: nothing of that kind there, or damaged.
    """
    # Without a test split a place is one set of samples: nothing is held out.
    options = SourceOptions(test_fraction=0, size=size, crop=crop, grey=grey, shuffle=False)
    if is_spec(spec):
        held_out = {} if whole else {"test_fraction": SourceOptions().test_fraction}
        return SourcePartitions(spec, split, options.model_copy(update=held_out))
    url = storage.check_url(spec)
    if url.endswith(".tar"):
        return TarPartitions([spec], size, crop, grey)
    if posixpath.basename(url) == MANIFEST or storage.exists(storage.join(url, MANIFEST)):
        return PackPartitions(load_manifest(url), split)
    if not storage.exists(url):
        raise UserError(f"{spec}: nothing is there: check the path or name a source ({SPECS})")
    kind = "array" if url.endswith((".npy", ".npz")) else "images"
    tars = [storage.join(url, name) for name in storage.names(url) if name.endswith(".tar")]
    if kind == "images" and tars:
        return TarPartitions(tars, size, crop, grey)
    return SourcePartitions(f"{kind}:{url}", split, options)


class PackPartitions(Partitions):
    """One split of a pack: neighbouring members of one shard make a partition."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.manifest, self.split = manifest, split
        self.name, self.levels = manifest.name, manifest.levels
        self.scale, self.class_names = _scale(manifest.dtype, manifest.levels), manifest.class_names
        self.shape, options = manifest.shape, manifest.source.options
        self.facts = {"split": split, **({"packing": options} if options else {})}
        by = options.get(CLASSIFIED)
        if isinstance(by, dict):
            self.classifier = (str(by.get("name")), str(by.get("fingerprint")), bool(by.get("of_labels")))
        # Of each partition: its shard, the shard's first block in the split, first member and the one after the last.
        self.ranges: list[tuple[ShardRecord, int, int, int]] = []
        keys, sizes, first = [], [], 0
        for shard in manifest.split(split).shards:
            runs = max(1, min(len(shard.members), round(shard.bytes / _PARTITION_BYTES)))
            for part in np.array_split(np.arange(len(shard.members)), runs):
                low, high = int(part[0]), int(part[-1]) + 1
                self.ranges.append((shard, first, low, high))
                keys.append(f"{shard.sha256} {low} {high}")
                sizes.append(sum(shard.members[i][0] for i in range(low, high)))
            first += len(shard.members)
        self.keys, self.sizes = keys, sizes
        # A shard keeps its random numbers when others come or go.
        self.seeds = _told_apart(keys)
        self.fingerprint = hashlib.sha256(f"{manifest.fingerprint} {split}".encode()).hexdigest()
        self._checked: set[str] = set()

    def only(self, number: int) -> Partitions:
        one = cast(PackPartitions, super().only(number))
        one.ranges = _one(self.ranges, number)
        one.manifest = self.manifest.model_copy(update={"splits": {}})
        return one

    def pieces(self, number: int) -> Iterator[Piece]:
        return self._members(number, None)

    def _pieces_with(self, number: int, rows: np.ndarray) -> Iterator[Piece]:
        return self._members(number, rows)

    def _members(self, number: int, wanted: np.ndarray | None) -> Iterator[Piece]:
        """The members of a partition; with `wanted` only those that hold such rows are read."""
        shard, first, low, high = self.ranges[number]
        if shard.file not in self._checked:
            check_size(self.manifest, shard)
            self._checked.add(shard.file)
        stem, start = posixpath.splitext(shard.file)[0], 0
        for member in range(low, high):
            rows = shard.members[member][0]
            if wanted is None or ((wanted >= start) & (wanted < start + rows)).any():
                found = read_member(self.manifest, shard, member)
                names = functools.partial(_member_keys, stem, member, rows)
                noise, told = (EVAL_NOISE, first + member), found.get("probabilities")
                yield Piece(found["x"], found.get("label"), start, names, noise, told)
            start += rows


class SourcePartitions(Partitions):
    """One split of a source; opened again by its spec in every process that reads it."""

    def __init__(self, spec: str, split: str, options: SourceOptions) -> None:
        source, self.split = _chosen(spec, split, options)
        self.asked = (spec, self.split, options.model_dump_json(), source.stamp)
        self.source: Source | None = source
        self.name, self.levels, self.shape = source.name, source.levels, source.shape
        read = options.model_dump(mode="json", include={"size", "crop", "grey", "test_fraction", "seed"})
        self.facts = {"split": self.split, **read}
        self.scale, self.class_names = _scale(source.dtype, source.levels), source.class_names
        n = len(source.parts[self.split].rows)
        row_bytes = max(1, int(np.prod(source.shape)) * np.dtype(source.dtype).itemsize)
        step = max(1, _PARTITION_BYTES // row_bytes)
        self.starts = list(range(0, n, step))
        self.sizes = [min(n, start + step) - start for start in self.starts]
        identity = hashlib.sha256(json.dumps(self.asked).encode()).hexdigest()
        self.keys = [f"{identity} {start}" for start in self.starts]
        self.seeds = [f"{self.split} {start} {rows}" for start, rows in zip(self.starts, self.sizes)]

    def only(self, number: int) -> Partitions:
        one = cast(SourcePartitions, super().only(number))
        one.starts = _one(self.starts, number)
        return one

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "source": None}  # what is in memory stays here

    def pieces(self, number: int) -> Iterator[Piece]:
        source = self.source or _reopened(*self.asked)
        part, sizes = source.parts[self.split], self.sizes or ()
        for start in range(0, sizes[number], _PIECE_ROWS):
            first = self.starts[number] + start
            rows = part.rows[first : first + min(_PIECE_ROWS, sizes[number] - start)]
            x = np.ascontiguousarray(part.take(rows), dtype=source.dtype)
            label = None if part.labels is None else part.labels[rows].astype(np.int64)
            names = functools.partial(_source_keys, source, self.split, rows)
            yield Piece(x, label, start, names, (_NOISE, number, start))


class MemoryPartitions(Partitions):
    """Samples that are in memory already, on the scale of the scores: x [n, *shape] float32."""

    lasting = False

    def __init__(self, x: np.ndarray, *, name: str, scale: str, labels: np.ndarray | None = None) -> None:
        self.x, self.labels, self.name, self.scale, self.levels = x, labels, name, scale, None
        self.shape, self.facts = x.shape[1:], {}
        self.step = max(1, _PARTITION_BYTES // max(1, x[:1].nbytes))
        starts = range(0, len(x), self.step)
        self.sizes = [min(len(x), start + self.step) - start for start in starts]
        self.keys = self.seeds = [f"memory {start}" for start in starts]

    def only(self, number: int) -> Partitions:
        return self  # sent once for all partitions, and mapped into the memory of every worker

    def pieces(self, number: int) -> Iterator[Piece]:
        rows = slice(number * self.step, (number + 1) * self.step)
        x = np.ascontiguousarray(self.x[rows], np.float32)
        label = None if self.labels is None else self.labels[rows].astype(np.int64)
        yield Piece(x, label, 0, lambda: [str(rows.start + row) for row in range(len(x))], (_NOISE, number, 0))


class ReshapedPartitions(Partitions):
    """The same samples in another shape of as many values, such as [h, w] with a channel axis: [h, w, 1]."""

    def __init__(self, inner: Partitions, shape: tuple[int, ...]) -> None:
        vars(self).update({name: getattr(inner, name) for name in Partitions.__annotations__})
        self.inner, self.shape = inner, shape
        self.keys = [f"{key} {shape}" for key in inner.keys]
        self.facts = {**inner.facts, "reshaped_from": list(inner.shape)}

    def only(self, number: int) -> Partitions:
        one = cast(ReshapedPartitions, super().only(number))
        one.inner = self.inner.only(number)
        return one

    def pieces(self, number: int) -> Iterator[Piece]:
        for piece in self.inner.pieces(number):
            yield replace(piece, x=piece.x.reshape(len(piece.x), *self.shape))


class TarPartitions(Partitions):
    """Third-party WebDataset shards: each is a partition."""

    sizes = None

    def __init__(self, urls: list[str], size: int | None, crop: images.Box | None, grey: bool | None) -> None:
        self.urls, self.shaping = expand_urls(urls), (size, crop, grey)
        self.name = Path(self.urls[0]).stem
        first = next((self._shaped(sample) for sample in read_webdataset(self.urls)), None)
        if first is None:
            raise UserError(f"{urls[0]}: no samples in these shards: check the path")
        self.shape, self.dtype = first.shape, first.dtype
        self.levels = 256 if first.dtype == np.uint8 else None
        self.scale = _scale("uint8" if self.levels else "float32", self.levels)
        self.facts = {"size": size, "crop": crop, "grey": grey}
        marks = [storage.mark(url) for url in self.urls]
        # Tars of many sizes are padded to one: the size alone tells nothing.
        self.lasting = all(mark for _, mark in marks)
        shaping = json.dumps(self.shaping)
        self.keys = [f"{url} {n_bytes} {mark} {shaping}" for url, (n_bytes, mark) in zip(self.urls, marks)]
        self.seeds = _told_apart([f"{posixpath.basename(url)} {n}" for url, (n, _) in zip(self.urls, marks)])

    def only(self, number: int) -> Partitions:
        one = cast(TarPartitions, super().only(number))
        one.urls = _one(self.urls, number)
        return one

    def pieces(self, number: int) -> Iterator[Piece]:
        waiting: list[dict[str, Any]] = []
        start = 0
        for sample in read_webdataset([self.urls[number]]):
            x = self._shaped(sample)
            if (x.shape, x.dtype) != (self.shape, self.dtype):
                raise UserError(
                    f"{sample['url']}: sample {sample['key']!r} is {x.dtype} {x.shape}, others are {self.dtype} "
                    f"{self.shape}: set size and grey to bring all images to one shape"
                )
            waiting.append({**sample, "x": x})
            if len(waiting) == _PIECE_ROWS:
                yield self._piece(waiting, number, start)
                start, waiting = start + len(waiting), []
        if waiting:
            yield self._piece(waiting, number, start)

    def _piece(self, samples: list[dict[str, Any]], number: int, start: int) -> Piece:
        x = np.stack([sample["x"] for sample in samples])
        if x.dtype != np.uint8:
            with np.errstate(over="ignore"):  # what becomes infinite is refused
                x = x.astype(np.float32)
            if not np.isfinite(x).all():
                raise UserError(f"{samples[0]['url']}: NaN or infinite values in this shard: remove or repair them")
        known = [sample["label"] for sample in samples if "label" in sample]
        label = np.array(known, dtype=np.int64) if len(known) == len(samples) else None
        stem = posixpath.splitext(posixpath.basename(samples[0]["url"]))[0]
        names = [f"{stem}/{sample['key']}" for sample in samples]
        return Piece(x, label, start, names.copy, (_NOISE, number, start))

    def _shaped(self, sample: dict[str, Any]) -> np.ndarray:
        x: np.ndarray = sample["x"]
        size, crop, grey = self.shaping
        if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] not in (1, 3) or self.shaping == (None, None, None):
            return x
        if crop is not None and (crop[2] > x.shape[1] or crop[3] > x.shape[0]):
            raise UserError(f"{sample['url']}: crop {crop} leaves sample {sample['key']!r}: choose a smaller one")
        image = Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x)
        return images.fit(image if grey is None else image.convert("L" if grey else "RGB"), size, crop)


def _scale(dtype: str, levels: int | None) -> str:
    return f"{dtype} / {levels - 1}" if levels else "float32 as stored"


def _chosen(spec: str, split: str, options: SourceOptions) -> tuple[Source, str]:
    """A source and the name of its split; what has only one is taken whole."""
    source = open_source(spec, options)
    chosen = split if len(source.parts) > 1 else next(iter(source.parts))
    if chosen not in source.parts:
        raise UserError(f"{spec} has no split {chosen!r}: choose one of {', '.join(source.parts)}")
    return source, chosen


@functools.lru_cache(maxsize=4)
def _reopened(spec: str, split: str, options: str, stamp: str) -> Source:
    """The same source in another process, once for all of its partitions."""
    source, _ = _chosen(spec, split, SourceOptions.model_validate_json(options))
    if source.stamp != stamp:
        raise UserError(f"{spec}: changed while it was read, or differs from node to node: run this again")
    return source


def _member_keys(stem: str, member: int, rows: int) -> list[str]:
    return [f"{stem}/{member:08d}/{row}" for row in range(rows)]


def _source_keys(source: Source, split: str, rows: np.ndarray) -> list[str]:
    names = source.names
    return [f"{split}/{row}" for row in rows] if names is None else [names(int(row)) for row in rows]
