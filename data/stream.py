"""Shards to batches: a training order that is a pure function of seed and epoch, and exactly-once evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data import augment as augmentations
from data.errors import UserError
from data.manifest import Manifest, check_size
from data.members import Block, join, read_member
from data.pixels import dequantise, scale

# First word of every random key, so that no two uses draw the same numbers.
_ORDER, _SHUFFLE, _TRAIN_NOISE, EVAL_NOISE, _AUGMENT = 1, 2, 3, 4, 5


class SplitReader:
    """Random access to the blocks of one split; `starts` [n_blocks + 1] are their positions in the split."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.manifest = manifest
        shards = manifest.split(split).shards
        self.places = [(shard, number) for shard in shards for number in range(len(shard.members))]
        rows = [shard.members[number][0] for shard, number in self.places]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return len(self.places)

    def read(self, block: int) -> Block:
        """Block number `block` as stored; the shard's size is compared once, the block's checksums always."""
        shard, number = self.places[block]
        if shard.file not in self._checked:
            check_size(self.manifest, shard)
            self._checked.add(shard.file)
        return read_member(self.manifest, shard, number)


class ShardStream:
    """Training batches of one rank.

    The blocks of an epoch are permuted and the order cut into `lanes` equal shares; rows are shuffled within groups
    of neighbouring blocks of a lane. Every step takes equally many rows from each lane, and rank r serves the lanes
    r, r + world_size, ...: the batch of all ranks together depends on (seed, epoch, lanes, step), not on the number
    of ranks, and every rank makes equally many steps. What is left at the end of a lane is dropped; another epoch
    drops something else.

    Args:
        manifest: of the pack.
        split: which split.
        batch_size: rows per step of all ranks together.
        seed: fixes order and noise.
        rank, world_size: which share this process serves.
        lanes: shares of the order; a multiple of world_size, a divisor of batch_size; default world_size. Choose
            more to be able to go on later with another number of ranks.
        dequantise: "x" is (v + u) / levels instead of v / (levels - 1).
        augment: "mirror" takes a random one of each image and its mirror image, anew in every epoch.
        group: blocks that are shuffled together, and held in memory per lane.

    Raises:
        UserError: numbers that do not divide, a missing or empty split, a split smaller than one batch, or
            dequantisation of real numbers.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        lanes: int | None = None,
        dequantise: bool = False,
        augment: Sequence[str] = (),
        group: int = 8,
    ) -> None:
        lanes = lanes or world_size
        if lanes % world_size:
            raise UserError(f"{lanes} lanes cannot be shared by {world_size} workers: choose a multiple")
        if batch_size < 1 or batch_size % lanes:
            raise UserError(f"a batch of {batch_size} rows cannot be shared by {lanes} lanes: choose a multiple")
        if dequantise and manifest.levels is None:
            raise UserError(f"{manifest.base}: real numbers cannot be dequantised: switch dequantisation off")
        augmentations.check(augment, manifest.shape)
        self.manifest, self.split, self.batch_size, self.seed = manifest, split, batch_size, seed
        self.rank, self.world_size, self.lanes = rank, world_size, lanes
        self.dequantise, self.augment, self.group = dequantise, tuple(augment), group
        n = manifest.n_samples(split)
        self._lane_rows = batch_size // lanes
        self.steps_per_epoch = n // lanes // self._lane_rows
        if not self.steps_per_epoch:
            raise UserError(f"{manifest.base}: {split} has {n} samples, a batch {batch_size}: lower it")

    def state(self) -> dict[str, Any]:
        """All that the order of batches depends on, as JSON; equal states give equal batches for (epoch, step)."""
        return {
            "data": self.manifest.fingerprint,
            "split": self.split,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "lanes": self.lanes,
            "group": self.group,
            "dequantise": self.dequantise,
            "augment": list(self.augment),
        }

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's part of the batches from `start_step` on; skipped data is not read.

        Yields "x" float32 [batch_size / world_size, *shape] and, where there are labels, "label" int64.

        Raises:
            UserError: a shard is missing, truncated or changed.
        """
        return self._steps(epoch, range(start_step, self.steps_per_epoch))

    def loader(self, epoch: int, start_step: int = 0, workers: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """The same batches in the same order as `epoch`, read ahead by `workers` processes."""
        if not workers:
            yield from self.epoch(epoch, start_step)
            return
        fault: UserError | None = None
        try:
            yield from DataLoader(_Epoch(self, epoch, start_step), batch_size=None, num_workers=workers)
        except UserError as error:
            # torch puts the worker's whole traceback before the message.
            fault = type(error)(re.split(r"\b\w*Error: ", str(error))[-1].strip())
            # The frames of the traceback hold the loader; with it gone, its workers end now.
            error.__traceback__ = None
        if fault is not None:
            raise fault

    def _steps(self, epoch: int, steps: range) -> Iterator[dict[str, torch.Tensor]]:
        reader = SplitReader(self.manifest, self.split)
        order = np.random.default_rng([_ORDER, self.seed, epoch]).permutation(len(reader))
        lanes = [_Lane(self, reader, order, epoch, lane) for lane in range(self.rank, self.lanes, self.world_size)]
        for step in steps:
            rows = join([lane.batch(step) for lane in lanes])
            yield {name: torch.from_numpy(values) for name, values in rows.items()}


class _Epoch(IterableDataset[dict[str, torch.Tensor]]):
    """The steps of one epoch, dealt out to loader workers in turn; the loader collects them in the same turn."""

    def __init__(self, stream: ShardStream, epoch: int, start_step: int) -> None:
        self.stream, self.epoch, self.start_step = stream, epoch, start_step

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        steps = range(self.start_step + first, self.stream.steps_per_epoch, stride)
        return self.stream._steps(self.epoch, steps)


class _Lane:
    """One contiguous share of an epoch's order, holding one shuffled group of blocks at a time."""

    def __init__(self, stream: ShardStream, reader: SplitReader, order: np.ndarray, epoch: int, lane: int) -> None:
        self.stream, self.reader, self.epoch, self.lane = stream, reader, epoch, lane
        rows = np.diff(reader.starts)[order]
        ends = np.cumsum(rows)
        share = int(ends[-1]) // stream.lanes
        low, high = lane * share, (lane + 1) * share
        first, last = int(np.searchsorted(ends, low, "right")), int(np.searchsorted(ends, high, "left"))
        # (block, from, to): the blocks at both ends belong to the lane in part.
        self.segments = [
            (int(order[i]), max(0, low - int(ends[i] - rows[i])), min(int(rows[i]), high - int(ends[i] - rows[i])))
            for i in range(first, last + 1)
        ]
        lengths = [stop - start for _, start, stop in self.segments]
        self.group_starts = np.concatenate([[0], np.cumsum(lengths)[stream.group - 1 :: stream.group], [share]])
        self.loaded = -1
        self.rows: Block = {}

    def batch(self, step: int) -> Block:
        """The lane's rows of one step, with "x" in float32."""
        stream = self.stream
        low = step * stream._lane_rows
        high, parts = low + stream._lane_rows, []
        while low < high:
            number = int(np.searchsorted(self.group_starts, low, "right")) - 1
            start, stop = int(self.group_starts[number]), min(high, int(self.group_starts[number + 1]))
            self._load(number)
            parts.append({name: values[low - start : stop - start] for name, values in self.rows.items()})
            low = stop
        rows = join(parts)
        levels = stream.manifest.levels
        if stream.dequantise and levels is not None:
            rows["x"] = dequantise(rows["x"], levels, [_TRAIN_NOISE, stream.seed, self.epoch, self.lane, step])
        else:
            rows["x"] = scale(rows["x"], levels)
        key = [_AUGMENT, stream.seed, self.epoch, self.lane, step]
        rows["x"] = augmentations.augment(rows["x"], stream.augment, key)
        return rows

    def _load(self, number: int) -> None:
        if number == self.loaded:
            return
        size = self.stream.group
        blocks = []
        for block, start, stop in self.segments[number * size : (number + 1) * size]:
            read = self.reader.read(block)
            blocks.append({name: values[start:stop] for name, values in read.items() if name in ("x", "label")})
        key = [_SHUFFLE, self.stream.seed, self.epoch, self.lane, number]
        mixed = np.random.default_rng(key).permutation(sum(len(block["x"]) for block in blocks))
        self.rows = {name: values[mixed] for name, values in join(blocks).items()}
        self.loaded = number


def read_blocks(
    manifest: Manifest,
    split: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    dequantise_seed: int | None = None,
    raw: bool = False,
) -> Iterator[Block]:
    """Every sample of a split exactly once over all ranks, in blocks as stored; rank r reads r, r + world_size, ...

    Args:
        manifest, split: what to read.
        rank, world_size: which share.
        dequantise_seed: add noise to pixels, a pure function of this seed and the block, whatever the world size.
        raw: keep "x" in the stored dtype, for writing it anew.

    Yields:
        "x" [rows, *shape] (float32, see `scale` and `dequantise`, unless raw), "label" [rows] int64 where there are
        labels, "index" [rows] int64: positions in the split.

    Raises:
        UserError: a missing or empty split, a shard that is missing, truncated or changed, or noise for reals.
    """
    if dequantise_seed is not None and manifest.levels is None:
        raise UserError(f"{manifest.base}: real numbers cannot be dequantised: switch dequantisation off")
    reader = SplitReader(manifest, split)
    for number in range(rank, len(reader), world_size):
        block = reader.read(number)
        if dequantise_seed is not None and manifest.levels is not None and not raw:
            block["x"] = dequantise(block["x"], manifest.levels, [EVAL_NOISE, dequantise_seed, number])
        elif not raw:
            block["x"] = scale(block["x"], manifest.levels)
        block["index"] = np.arange(reader.starts[number], reader.starts[number + 1], dtype=np.int64)
        yield block


def read_labels(manifest: Manifest, split: str) -> np.ndarray:
    """The labels [n] int64 of a split, without reading its samples.

    Raises:
        UserError: no labels, a missing or empty split, a shard that is missing, truncated or changed.
    """
    if not manifest.has_labels:
        raise UserError(f"{manifest.base}: the samples have no labels: pack them with labels")
    shards = manifest.split(split).shards
    members = ((shard, number) for shard in shards for number in range(len(shard.members)))
    return np.concatenate([read_member(manifest, *place, labels_only=True)["label"] for place in members])
