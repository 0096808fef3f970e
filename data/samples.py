"""Samples to be judged, from wherever they lie, as one array in memory."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import images, storage
from data.errors import UserError
from data.foreign import expand_urls, read_webdataset
from data.manifest import MANIFEST, load_manifest
from data.pixels import scale
from data.sources import SPECS, Source, SourceOptions, is_spec, open_source
from data.stream import SplitReader


@dataclass(frozen=True)
class Samples:
    """Samples in memory.

    Attributes:
        x: [n, *shape] float32, pixels scaled to [0, 1], images channels last.
        labels: [n] int64, or None.
        name: of the data set or file.
        fingerprint: SHA-256 of shape, dtype, levels and the stored values.
        scale: how `x` was made of the stored values, in words.
        levels: number of values of a pixel; None for real numbers.
    """

    x: np.ndarray
    labels: np.ndarray | None
    name: str
    fingerprint: str
    scale: str
    levels: int | None = None


def load_samples(
    spec: str,
    *,
    split: str = "test",
    max_samples: int | None = None,
    seed: int = 0,
    size: int | None = None,
    crop: tuple[int, int, int, int] | None = None,
    grey: bool | None = None,
) -> Samples:
    """Loads samples from a pack, third-party shards, a folder of images, an array, or a source.

    Args:
        spec: a folder with manifest.json (or that file), .tar files (braces allowed) or a folder of them, a folder
            of images, a .npy or .npz file, or a spec of `open_source`.
        split: of a pack or source; what has no splits is taken whole.
        max_samples: a random subset of so many, in the order of the whole; None means all.
        seed: fixes the subset.
        size, crop, grey: for images in folders and third-party shards, as in `SourceOptions`.

    Raises:
        UserError: nothing of that kind there, damaged data, or images of different shapes.
    """
    if is_spec(spec):
        options = SourceOptions(size=size, crop=crop, grey=grey, shuffle=False)
        return _from_source(open_source(spec, options), split, max_samples, seed)
    url = storage.check_url(spec)
    if url.endswith(".tar"):
        return _from_tars([spec], max_samples, seed, size, crop, grey)
    if posixpath.basename(url) == MANIFEST or storage.exists(storage.join(url, MANIFEST)):
        return _from_pack(url, split, max_samples, seed)
    if not storage.exists(url):
        raise UserError(f"{spec}: nothing is there: check the path or name a source ({SPECS})")
    kind = "array" if url.endswith((".npy", ".npz")) else "images"
    tars = [storage.join(url, name) for name in storage.names(url) if name.endswith(".tar")]
    if kind == "images" and tars:
        return _from_tars(tars, max_samples, seed, size, crop, grey)
    # Without a test split such a place is one set of samples: nothing is held out.
    options = SourceOptions(test_fraction=0, size=size, crop=crop, grey=grey, shuffle=False)
    return _from_source(open_source(f"{kind}:{url}", options), split, max_samples, seed)


def _choose(n: int, limit: int | None, seed: int) -> np.ndarray:
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))


def _from_pack(url: str, split: str, limit: int | None, seed: int) -> Samples:
    manifest = load_manifest(url)
    reader = SplitReader(manifest, split)
    rows = _choose(manifest.n_samples(split), limit, seed)
    block_of = np.searchsorted(reader.starts, rows, "right") - 1
    blocks = []
    for number in np.unique(block_of):
        chosen = rows[block_of == number] - reader.starts[number]
        blocks.append({name: values[chosen] for name, values in reader.read(int(number)).items()})
    labels = np.concatenate([block["label"] for block in blocks]) if manifest.has_labels else None
    return _samples(np.concatenate([block["x"] for block in blocks]), labels, manifest.name, manifest.levels)


def _from_source(source: Source, split: str, limit: int | None, seed: int) -> Samples:
    chosen = split if len(source.parts) > 1 else next(iter(source.parts))
    if chosen not in source.parts:
        raise UserError(f"{source.spec} has no split {chosen!r}: choose one of {', '.join(source.parts)}")
    part = source.parts[chosen]
    rows = part.rows[_choose(len(part.rows), limit, seed)]
    labels = None if part.labels is None else part.labels[rows].astype(np.int64)
    return _samples(part.take(rows).astype(source.dtype, copy=False), labels, source.name, source.levels)


def _from_tars(
    urls: list[str], limit: int | None, seed: int, size: int | None, crop: images.Box | None, grey: bool | None
) -> Samples:
    kept: list[tuple[int, np.ndarray, int | None]] = []
    rng = np.random.default_rng(seed)
    for number, sample in enumerate(read_webdataset(urls)):
        # Reservoir sampling: the number of samples is known only at the end.
        place = number if limit is None or number < limit else int(rng.integers(number + 1))
        if limit is not None and place >= limit:
            continue
        x = _shaped(sample, size, crop, grey)
        if kept and (x.shape, x.dtype) != (kept[0][1].shape, kept[0][1].dtype):
            raise UserError(
                f"{sample['url']}: sample {sample['key']!r} is {x.dtype} {x.shape}, others are {kept[0][1].dtype} "
                f"{kept[0][1].shape}: set size and grey to bring all images to one shape"
            )
        kept[place : place + 1] = [(number, x, sample.get("label"))]
    if not kept:
        raise UserError(f"{urls[0]}: no samples in these shards: check the path")
    kept.sort(key=lambda entry: entry[0])
    x = np.stack([entry[1] for entry in kept])
    known = [entry[2] for entry in kept if entry[2] is not None]
    labels = np.array(known, dtype=np.int64) if len(known) == len(kept) else None
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise UserError(f"{urls[0]}: NaN or infinite values in these shards: remove or repair them")
    name = Path(expand_urls(urls)[0]).stem
    return _samples(x, labels, name, 256 if x.dtype == np.uint8 else None)


def _shaped(sample: dict[str, Any], size: int | None, crop: images.Box | None, grey: bool | None) -> np.ndarray:
    x: np.ndarray = sample["x"]
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] not in (1, 3) or (size, crop, grey) == (None, None, None):
        return x
    if crop is not None and (crop[2] > x.shape[1] or crop[3] > x.shape[0]):
        raise UserError(f"{sample['url']}: crop {crop} leaves sample {sample['key']!r}: choose a smaller one")
    image = Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x)
    return images.fit(image if grey is None else image.convert("L" if grey else "RGB"), size, crop)


def _samples(x: np.ndarray, labels: np.ndarray | None, name: str, levels: int | None) -> Samples:
    digest = hashlib.sha256(json.dumps([x.shape, x.dtype.str, levels]).encode())
    for row in _pieces(x):
        digest.update(np.ascontiguousarray(row).data)
    words = f"{x.dtype} / {levels - 1}" if levels else "float32 as stored"
    return Samples(scale(x, levels), labels, name, digest.hexdigest(), words, levels)


def _pieces(x: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(x), 1024):
        yield x[start : start + 1024]
