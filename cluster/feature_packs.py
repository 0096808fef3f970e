"""Features of a set, computed once and kept as a pack of vectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.scoring import Runner
from data import storage
from data.errors import UserError
from data.manifest import Manifest, Origin, ShardRecord, SplitRecord, save_manifest
from data.members import Block
from data.partitions import CLASSIFIED, Partitions
from data.shards import clear_killed, packing, write_shard
from eval.measure import View, blocks

# What the members of a shard hold besides their samples, and the number of features.
_Kind = tuple[tuple[str, ...], int]


def write_features(runner: Runner, sets: Mapping[str, Partitions], place: str, dest: str) -> Manifest:
    """Writes what the runner's view sees of some sets as the splits of one pack, all of it or nothing.

    Samples keep their order and their labels, and what the view's classifier says of each (`probabilities`). Every
    partition becomes a shard, written by the worker that reads it, in constant memory.

    Args:
        runner: passes over the sets; its view's features are written.
        sets: by the name of their split.
        place: what they were read from, for the pack's origin.
        dest: folder, as a path or URL, that every worker can write to.

    Raises:
        UserError: files are there already, two splits are the same samples, labels for some samples only, or as
            `Extractor` and `write_shard`.
    """
    clear_killed(dest, set())
    if storage.names(dest):
        raise UserError(f"{dest}: files are there already: choose another folder")
    first = next(iter(sets.values()), None)
    if first is None or len({key for each in sets.values() for key in each.keys}) < sum(map(len, sets.values())):
        raise UserError(f"{place}: {' and '.join(sets) or 'no split'}: name splits that it has, each once")
    view, done = runner.view(), 0
    names = [_file(split, number) for split, each in sets.items() for number in range(len(each))]
    splits: dict[str, SplitRecord] = {}
    kinds: set[_Kind] = set()
    with runner.stages.stage("write features", unit="samples") as advance, packing(dest, names):
        for split, partitions in sets.items():
            shards = []
            for written in runner.map(_write, partitions, split, dest, partitions.n or 0):
                if written is not None:
                    record, kind = written
                    shards.append(record)
                    kinds.add(kind)
                    done += record.samples
                    advance(done, total=sum(each.n or 0 for each in sets.values()) or None)
            splits[split] = SplitRecord(samples=sum(record.samples for record in shards), shards=shards)
        if len(kinds) != 1:
            what = "have labels only in part, or features of several lengths" if kinds else "are none"
            raise UserError(f"{place}: the samples {what}: repair them first")
        ((fields, n_features),) = kinds
        seen: dict[str, Any] = {"features": view.space.name, "fingerprint": view.space.fingerprint, **view.facts()}
        by, known = view.classes, first.classifier
        if by is not None:
            known = (by.name, by.fingerprint, by.of_labels)
        if "probabilities" in fields and known is not None:
            seen[CLASSIFIED] = dict(zip(("name", "fingerprint", "of_labels"), known))
        manifest = Manifest(
            name=first.name,
            shape=(n_features,),
            dtype="float32",
            class_names=None if first.class_names is None else tuple(first.class_names),
            source=Origin(spec=place, options={**seen, **{name: dict(each.facts) for name, each in sets.items()}}),
            splits=splits,
        )
        return save_manifest(manifest, dest)


def _file(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def _write(
    partitions: Partitions, number: int, view: View, split: str, dest: str, n: int
) -> tuple[ShardRecord, _Kind] | None:
    kinds: set[_Kind] = set()

    def looked() -> Iterator[Block]:
        for _, x, labels, kept in blocks(partitions, number):
            features, probabilities = view.look(x)
            told = kept if probabilities is None else probabilities
            others = {"label": labels, "probabilities": told}
            block = {"x": features, **{name: values for name, values in others.items() if values is not None}}
            kinds.add((tuple(block), features.shape[1]))
            if len(kinds) > 1:
                raise UserError(f"{partitions.name}: labels for some samples only: repair them first")
            yield block

    found = looked()
    begun = next(found, None)
    if begun is None:  # an empty shard of somebody else
        return None
    record = write_shard(storage.join(dest, _file(split, number)), itertools.chain([begun], found), n_samples=n)
    return record, kinds.pop()
