"""Packing a source into WebDataset tar shards with a manifest, and writing single shards."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import posixpath
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO

import numpy as np
import webdataset

from data import storage
from data.errors import UserError
from data.manifest import (
    MANIFEST,
    Manifest,
    Member,
    Origin,
    ShardRecord,
    SplitRecord,
    load_manifest,
    save_manifest,
)
from data.members import Block, block_rows, encode, regroup
from data.sources import Source

# Lists the files of a pack under way, so that the next pack can clear up after one that was killed.
_JOURNAL = "packing.json"
_TAR_BLOCK = 512


class _Summing:
    """Passes bytes on to a file, adding up their number and SHA-256."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle, self.size, self.digest = handle, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.digest.update(data)
        return self.handle.write(data)


def write_shard(
    url: str, blocks: Iterable[Block], *, rows_per_block: int | None = None, n_samples: int = 0
) -> ShardRecord:
    """Writes one shard, whole or not at all; equal samples give equal bytes.

    Args:
        url: where; its last part becomes the record's file name.
        blocks: {"x": [rows, *shape], "label": [rows] int64, ...} in any sizes; regrouped on the way.
        rows_per_block: samples per member at most; by their size where None (see `block_rows`).
        n_samples: how many come, where that is known: many vectors get larger members.

    Raises:
        UserError: no samples, or the place cannot be written.
    """
    members: list[Member] = []
    with storage.publish(url) as handle:
        out = _Summing(handle)
        # An int for the time: anything else adds a header of 1 KiB to every member, or the clock to the bytes.
        with webdataset.TarWriter(out, encoder=False, mtime=0) as tar:
            for block in regroup(blocks, rows_per_block, n_samples):
                fields, places, offset = encode(block), {}, tar.tarstream.offset
                for name in sorted(fields):
                    length = len(fields[name])
                    places[name] = (offset + _TAR_BLOCK, length, zlib.crc32(fields[name]))
                    offset += _TAR_BLOCK + -(-length // _TAR_BLOCK) * _TAR_BLOCK
                tar.write({"__key__": f"{len(members):08d}", **fields})
                members.append((len(block["x"]), places))
        if not members:
            raise UserError(f"{url}: no samples to write: a shard needs at least one")
    samples = sum(rows for rows, _ in members)
    name, checksum = posixpath.basename(url), out.digest.hexdigest()
    return ShardRecord(file=name, samples=samples, bytes=out.size, sha256=checksum, members=members)


def pack(
    source: Source,
    dest: str,
    *,
    rows_per_block: int | None = None,
    shard_bytes: int = 64 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Writes a source as shards `SPLIT-000000.tar` with a `manifest.json`, all of it or nothing.

    A pack that was there before stays whole until the new manifest is written, and is removed then. The bytes are
    a pure function of the source and the arguments. One process at a time may pack into a folder.

    Args:
        source: see `data.sources.open_source`.
        dest: folder, as a path or URL.
        rows_per_block: samples per member at most; by their size and number where None (see `block_rows`).
        shard_bytes: size at which the next shard is begun.
        progress: called with (samples written, samples in all).

    Raises:
        UserError: the source is damaged or the folder cannot be written.
    """
    dest = storage.check_url(dest)
    old = load_manifest(dest) if storage.exists(storage.join(dest, MANIFEST)) else None
    old_files = [shard.file for record in old.splits.values() for shard in record.shards] if old else []
    clear_killed(dest, set(old_files))
    row_bytes = math.prod(source.shape) * np.dtype(source.dtype).itemsize
    rows = {split: block_rows(source.shape, source.dtype, rows_per_block, n) for split, n in source.splits.items()}
    per_shard = {split: max(1, shard_bytes // (rows[split] * row_bytes)) for split in rows}
    plan = _free_names(dest, {split: -(-n // (rows[split] * per_shard[split])) for split, n in source.splits.items()})
    new_files = [name for files in plan.values() for name in files]
    with packing(dest, new_files, old_files):
        splits: dict[str, SplitRecord] = {}
        total = sum(source.splits.values())
        for split, files in plan.items():
            done = sum(record.samples for record in splits.values())
            blocks = _counted(source.blocks(split, rows[split]), done, total, progress)
            shards = []
            for name in files:
                share = itertools.islice(blocks, per_shard[split])
                shards.append(write_shard(storage.join(dest, name), share, rows_per_block=rows[split]))
            splits[split] = SplitRecord(samples=source.splits[split], shards=shards)
        manifest = Manifest(
            name=source.name,
            shape=source.shape,
            dtype="uint8" if source.dtype == "uint8" else "float32",
            levels=source.levels,
            class_names=source.class_names,
            source=Origin(spec=source.spec, options=source.options, stamp=source.stamp),
            splits=splits,
        )
        return save_manifest(manifest, dest)


@contextlib.contextmanager
def packing(dest: str, new: Sequence[str], old: Sequence[str] = ()) -> Iterator[None]:
    """Files are written into a pack: `new` ones are removed where that fails, `old` ones where it is done.

    What a killed process leaves is removed by `clear_killed`.
    """
    storage.write_text(storage.join(dest, _JOURNAL), json.dumps([*new, *old]))
    try:
        yield
    except BaseException:
        for name in [*new, _JOURNAL]:
            with contextlib.suppress(Exception):
                storage.remove(storage.join(dest, name))
        raise
    for name in [*old, _JOURNAL]:
        storage.remove(storage.join(dest, name))


def _counted(
    blocks: Iterator[Block], done: int, total: int, progress: Callable[[int, int], None] | None
) -> Iterator[Block]:
    for block in blocks:
        done += len(block["x"])
        if progress is not None:
            progress(done, total)
        yield block


def _free_names(dest: str, n_shards: dict[str, int]) -> dict[str, list[str]]:
    """{split: file names}, none of them taken: what is there may be a pack in use, or the user's own."""
    present = set(storage.names(dest))
    attempt, tag = 0, ""
    while True:
        plan = {split: [f"{split}{tag}-{i:06d}.tar" for i in range(n)] for split, n in n_shards.items()}
        if present.isdisjoint(itertools.chain(*plan.values())):
            return plan
        attempt += 1
        tag = f"-{attempt}"


def clear_killed(dest: str, kept: set[str]) -> None:
    """Removes what a killed pack left behind, except the files of the manifest in force."""
    present = storage.names(dest)
    if _JOURNAL not in present:
        return
    try:
        listed = set(json.loads(storage.read_bytes(storage.join(dest, _JOURNAL))))
    except (ValueError, TypeError):
        listed = set()
    for name in present:
        if name.partition(".partial-")[0] in listed - kept:
            storage.remove(storage.join(dest, name))
    storage.remove(storage.join(dest, _JOURNAL))
