"""What evaluation leaves per sample: Parquet files, and the reference's samples of missing bins as a pack."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.densities import DensityOption
from cluster.questions import check_places
from cluster.scoring import Runner
from data import kmeans, storage
from data.errors import UserError
from data.manifest import MANIFEST, Manifest, Origin, SplitRecord, save_manifest
from data.members import Block, block_rows
from data.partitions import Partitions, Piece
from data.pixels import scale
from data.shards import write_shard
from eval.bins import Bins
from eval.measure import View, seen_by
from eval.observed import Observed
from eval.reference import Reference

_SHARD_BYTES = 64 << 20
MISSING_SPLIT = "train"
_PART, _SHARD = re.compile(r"part-\d{6}\.parquet"), re.compile(MISSING_SPLIT + r"-\d{6}\.tar")
# Readers of a folder of Parquet files pass over names that begin so.
_WHOLE = "_per-sample.json"


@dataclass(frozen=True)
class Neighbours:
    """Random reference samples among which the nearest one is searched: features [m, d] and their keys."""

    features: np.ndarray
    keys: list[str]


def neighbours_of(reference: Reference) -> Neighbours | None:
    """The reference's random subset, by name; None where its samples are not at hand or none were kept."""
    sketch, partitions = reference.summary.sketch, reference.partitions
    if sketch is None or partitions is None:
        return None
    return Neighbours(sketch.features(), partitions.names(sketch.positions()))


@dataclass(frozen=True)
class _Look:
    """What is told of every sample."""

    bins: Bins
    neighbours: Neighbours | None
    density: DensityOption | None


def check_exports(per_sample: str | None, export: str | None) -> None:
    """Refuses folders for the results of every sample, and for missing samples, that are taken.

    Raises:
        UserError: one holds such files already, or is none.
    """
    places = [storage.check_url(folder) for folder in (per_sample, export) if folder is not None]
    check_places(*(Path(place) / "a file" for place in places if storage.is_local(place)))
    if per_sample is not None and _kept(places[0], _PART, _WHOLE, ".parquet"):
        raise UserError(f"{per_sample}: Parquet files are there already: choose another folder, or remove them")
    if export is not None and _kept(storage.join(places[-1], "shards"), _SHARD, MANIFEST):
        raise UserError(f"{places[-1]}/shards: files are there already: choose another folder, or remove them")


def _kept(folder: str, own: re.Pattern[str], whole: str, ending: str = "") -> bool:
    """Whether a folder has files that must stay: those of a finished export, or of somebody else."""
    names = [name for name in storage.names(folder) if name.endswith(ending) or name == whole]
    return whole in names or not all(own.fullmatch(name) for name in names)


def _clear_killed(folder: str, own: re.Pattern[str]) -> None:
    """Removes what an export that was killed has left: parts without the mark that comes last."""
    for name in storage.names(folder):
        if own.fullmatch(name):
            storage.remove(storage.join(folder, name))


def write_per_sample(
    runner: Runner,
    partitions: Partitions,
    bins: Bins,
    neighbours: Neighbours | None,
    density: DensityOption | None,
    folder: str,
) -> int:
    """Writes `part-000000.parquet` ... with one row per sample, and returns the number of rows.

    `_per-sample.json` is written last: parts without it are of an export that was killed, and are written again.

    Columns: `key` (the shard's sample key), `bin`, `distance` (to the bin's centre, in the features' units; null for
    given classes), `label` (null where there is none). Where `neighbours` are given, `nearest_in_subset` and
    `nearest_in_subset_distance`: the nearest of those reference samples, a random subset of the reference, and not
    the nearest of all. With `density` also `log_likelihood` in nats and `component`, the most probable one (null
    where the model has none).

    Raises:
        UserError: Parquet files are there already, or the folder cannot be written.
    """
    check_exports(folder, None)
    place = storage.check_url(folder)
    _clear_killed(place, _PART)
    with runner.stages.stage("per-sample results", unit="samples") as advance:
        done = 0
        look = _Look(bins.without_pictures(), neighbours, density)
        for rows in runner.map(_write_part, partitions, look, place):
            done += rows
            advance(done, total=partitions.n)
        facts = {"samples": done, "bins": bins.fingerprint, "of": partitions.name}
        storage.write_text(storage.join(place, _WHOLE), json.dumps(facts, indent=1))
    return done


def _write_part(partitions: Partitions, number: int, view: View, look: _Look, folder: str) -> int:
    tables = [_rows(partitions, number, piece, view, look) for piece in partitions.pieces(number)]
    if not tables:  # an empty shard of somebody else
        return 0
    table = pa.concat_tables(tables)
    with storage.publish(storage.join(folder, f"part-{number:06d}.parquet")) as handle:
        pq.write_table(table, handle)
    return table.num_rows


def _rows(partitions: Partitions, number: int, piece: Piece, view: View, look: _Look) -> pa.Table:
    seen = _seen(partitions, number, piece, view)
    labels, squared = look.bins.assign(seen)
    neighbours, none = look.neighbours, pa.nulls(len(labels), pa.int64())
    columns: dict[str, Any] = {"key": pa.array(piece.keys()), "bin": labels}
    columns["distance"] = pa.nulls(len(labels), pa.float32()) if squared is None else np.sqrt(squared)
    columns["label"] = none if piece.label is None else piece.label
    if neighbours is not None:
        nearest, gaps = kmeans.assign(seen.features, neighbours.features)
        columns["nearest_in_subset"] = pa.array(np.array(neighbours.keys, object)[nearest])
        columns["nearest_in_subset_distance"] = np.sqrt(np.maximum(gaps, 0))
    if look.density is not None:
        columns["log_likelihood"], components = look.density.of(partitions, piece)
        columns["component"] = none if components is None else components
    return pa.table(columns)


def _seen(partitions: Partitions, number: int, piece: Piece, view: View) -> Observed:
    x = scale(piece.x, partitions.levels)
    return seen_by(view, partitions, number, piece.start, x, piece.label, piece.probabilities)


def export_missing(runner: Runner, reference: Reference, missing: Sequence[int], folder: str) -> tuple[int, str]:
    """Packs the reference's samples of some bins, with a list of their keys; returns their number and the pack's place.

    Leaves `folder`/missing.parquet (key, bin) and a pack (shards and manifest) in `folder`/shards.

    Raises:
        UserError: no bins, a reference whose samples are not at hand, or a pack that is there already.
    """
    partitions, bins = reference.partitions, reference.bins[0]
    if not missing:
        raise UserError("no bin has fewer samples: there is nothing to export")
    if partitions is None:
        raise UserError("the reference's samples are not at hand: name the data itself by --reference")
    check_exports(None, folder)
    place = storage.join(storage.check_url(folder), "shards")
    _clear_killed(place, _SHARD)
    keys: list[str] = []
    numbers: list[int] = []

    def chosen() -> Iterator[Block]:
        for found in runner.map(_missing_part, partitions, bins.without_pictures(), list(missing)):
            for names, labels, block in found:
                keys.extend(names)
                numbers.extend(labels)
                yield block
            advance(len(keys), total=int(bins.counts[list(missing)].sum()))

    with runner.stages.stage("export missing bins", unit="samples") as advance:
        blocks = chosen()
        first = next(blocks, None)
        if first is None:
            raise UserError("the missing bins hold no sample of this reference: take the one the bins were fitted to")
        manifest = _pack(itertools.chain([first], blocks), first, partitions, place)
        table = pa.table({"key": pa.array(keys), "bin": np.array(numbers, np.int64)})
        with storage.publish(storage.join(storage.check_url(folder), "missing.parquet")) as handle:
            pq.write_table(table, handle)
    return manifest.n_samples(MISSING_SPLIT), place


def _missing_part(
    partitions: Partitions, number: int, view: View, bins: Bins, missing: list[int]
) -> list[tuple[list[str], list[int], Block]]:
    """Keys, bins and samples of a partition that are in the missing bins."""
    found = []
    for piece in partitions.pieces(number):
        labels, _ = bins.assign(_seen(partitions, number, piece, view))
        rows = np.flatnonzero(np.isin(labels, missing))
        if len(rows):
            names, block = piece.keys(), {"x": piece.x[rows]}
            if piece.label is not None:
                block["label"] = piece.label[rows]
            found.append(([names[row] for row in rows], labels[rows].tolist(), block))
    return found


def _pack(blocks: Iterator[Block], first: Block, partitions: Partitions, place: str) -> Manifest:
    shape, dtype = first["x"].shape[1:], first["x"].dtype
    rows = block_rows(shape, dtype.str, 1000)
    per_shard = max(1, _SHARD_BYTES // max(1, first["x"][:1].nbytes))
    records = [
        write_shard(storage.join(place, f"{MISSING_SPLIT}-{number:06d}.tar"), share, rows_per_block=rows)
        for number, share in enumerate(_shares(blocks, per_shard))
    ]
    split = SplitRecord(samples=sum(record.samples for record in records), shards=records)
    manifest = Manifest(
        name=f"{partitions.name}-missing",
        shape=shape,
        dtype="uint8" if dtype == np.uint8 else "float32",
        levels=partitions.levels,
        source=Origin(spec=f"missing bins of {partitions.name}"),
        splits={MISSING_SPLIT: split},
    )
    return save_manifest(manifest, place)


def _shares(blocks: Iterator[Block], n: int) -> Iterator[list[Block]]:
    """Blocks of about n rows together."""
    held: list[Block] = []
    for block in blocks:
        held.append(block)
        if sum(len(part["x"]) for part in held) >= n:
            yield held
            held = []
    if held:
        yield held
