"""Samples drawn from a model by all workers, kept as a pack."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cluster.scoring import Runner
from data import storage
from data.errors import UserError
from data.manifest import Manifest, Origin, ShardRecord, SplitRecord, save_manifest
from data.members import Block
from data.shards import clear_killed, packing, write_shard
from eval.drawn import DrawnPartitions
from eval.measure import View

SPLIT = "test"  # which `evaluate` reads where it is told of no other


def write_samples(runner: Runner, drawn: DrawnPartitions, dest: str) -> Manifest:
    """Writes all samples as one split of a pack, all of it or nothing; the same bytes for any number of workers.

    Every partition becomes a shard, written by the worker that draws it. Pixels are written as
    bytes, other samples as float32.

    Args:
        runner: by whom.
        drawn: of which model, how many, with which seed.
        dest: folder, as a path or URL, that every worker can write to.

    Raises:
        UserError: files are there already, or the place cannot be written.
    """
    clear_killed(dest, set())
    if storage.names(dest):
        raise UserError(f"{dest}: files are there already: choose another folder")
    names = [_file(number) for number in range(len(drawn))]
    shards: list[ShardRecord] = []
    with runner.stages.stage("draw samples", total=drawn.n, unit="samples") as advance, packing(dest, names):
        for record in runner.map(_write, drawn, dest):
            shards.append(record)
            advance(sum(each.samples for each in shards))
        manifest = Manifest(
            name=drawn.name,
            shape=drawn.shape,
            dtype="float32" if drawn.grid is None else "uint8",
            levels=drawn.grid,
            source=Origin(spec=drawn.name, options=dict(drawn.facts)),
            splits={SPLIT: SplitRecord(samples=sum(each.samples for each in shards), shards=shards)},
        )
        return save_manifest(manifest, dest)


def _file(number: int) -> str:
    return f"{SPLIT}-{number:06d}.tar"


def _write(drawn: DrawnPartitions, number: int, view: View, dest: str) -> ShardRecord:
    return write_shard(storage.join(dest, _file(number)), _blocks(drawn, number), n_samples=drawn.n or 0)


def _blocks(drawn: DrawnPartitions, number: int) -> Iterator[Block]:
    for piece in drawn.pieces(number):
        x = piece.x.astype(np.float32)
        yield {"x": x if drawn.grid is None else np.rint(x * (drawn.grid - 1)).astype(np.uint8)}
