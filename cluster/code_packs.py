"""Codes of sets of any size, and what is decoded from them: as arrays, and as packs that all workers write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cluster.models import LocalAutoencoder, open_autoencoder
from cluster.scoring import Runner
from data import storage
from data.errors import UserError
from data.manifest import Manifest, Origin, ShardRecord, SplitRecord, save_manifest
from data.members import Block
from data.partitions import Partitions
from data.shards import clear_killed, packing, write_shard
from eval.measure import View, blocks
from trainer.settings import TEST_SPLIT


def encoded(runner: Runner, partitions: Partitions) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes [n, K] float32 and labels [n] (or None) of a set, by a runner whose view's features are the codes.

    Raises:
        UserError: samples that the encoder does not take.
    """
    return _gathered(runner, partitions, "encode", _encode_part)


def decoded(
    runner: Runner, partitions: Partitions, model: str, tracking_uri: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples [n, *shape] float32 and labels [n] (or None) of a set of codes.

    Raises:
        UserError: codes of another dimension than the model's.
    """
    return _gathered(runner, partitions, "decode", _decode_part, model, tracking_uri)


def write_decoded(runner: Runner, partitions: Partitions, model: str, tracking_uri: str | None, dest: str) -> Manifest:
    """Writes decoded codes, float32, as the split `test` of a pack: each partition a shard, in constant memory.

    Raises:
        UserError: as `decoded`; or files are there already.
    """
    clear_killed(dest, set())
    if storage.names(dest):
        raise UserError(f"{dest}: files are there already: choose another folder")
    opened = open_autoencoder(model, tracking_uri)
    names = [_shard(number) for number in range(len(partitions))]
    shards: list[ShardRecord] = []
    with runner.stages.stage("decode", total=partitions.n, unit="samples") as advance, packing(dest, names):
        for record in runner.map(_write_part, partitions, model, tracking_uri, dest):
            shards.append(record)
            advance(sum(each.samples for each in shards))
        manifest = Manifest(
            name=f"{opened.data['name']}-decoded",
            shape=tuple(opened.data["shape"]),
            dtype="float32",
            class_names=None if partitions.class_names is None else tuple(partitions.class_names),
            source=Origin(spec=f"{partitions.name} decoded by {model}", options={"model": opened.fingerprint}),
            splits={TEST_SPLIT: SplitRecord(samples=sum(each.samples for each in shards), shards=shards)},
        )
        return save_manifest(manifest, dest)


def _shard(number: int) -> str:
    return f"{TEST_SPLIT}-{number:06d}.tar"


def _write_part(
    partitions: Partitions, number: int, view: View, model: str, tracking_uri: str | None, dest: str
) -> ShardRecord:
    found = _decoded_blocks(partitions, number, model, tracking_uri)
    return write_shard(storage.join(dest, _shard(number)), found)


def _gathered(
    runner: Runner, partitions: Partitions, name: str, function: Callable[..., list[Block]], *arguments: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    found: list[Block] = []
    with runner.stages.stage(name, total=partitions.n, unit="samples") as advance:
        for part in runner.map(function, partitions, *arguments):
            found.extend(part)
            advance(sum(len(block["x"]) for block in found))
    if not found:
        raise UserError(f"{partitions.name}: no samples there: check the path and the split")
    labelled = all("label" in block for block in found)
    labels = np.concatenate([block["label"] for block in found]) if labelled else None
    return np.concatenate([block["x"] for block in found]), labels


def _encode_part(partitions: Partitions, number: int, view: View) -> list[Block]:
    return [_block(view.look(x)[0], labels) for _, x, labels, _ in blocks(partitions, number)]


def _decode_part(partitions: Partitions, number: int, view: View, model: str, tracking_uri: str | None) -> list[Block]:
    return list(_decoded_blocks(partitions, number, model, tracking_uri))


def _decoded_blocks(partitions: Partitions, number: int, model: str, tracking_uri: str | None) -> Iterator[Block]:
    opened = _opened(model, tracking_uri)
    for _, z, labels, _ in blocks(partitions, number):
        yield _block(opened.decode(z.reshape(len(z), -1)), labels)


def _block(x: np.ndarray, labels: np.ndarray | None) -> Block:
    return {"x": x} if labels is None else {"x": x, "label": labels}


@functools.lru_cache(maxsize=2)
def _opened(model: str, tracking_uri: str | None) -> LocalAutoencoder:
    return open_autoencoder(model, tracking_uri)
