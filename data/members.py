"""Members of shards: blocks of samples as .npy files, or one large image as PNG; encoding, checking, decoding."""

from __future__ import annotations

import io
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from data import storage
from data.manifest import Manifest, ShardRecord, damaged

# Bytes and rows of a member, at the most.
_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 1000
# Vectors come by the hundred million: larger members, where a split still has so many of them to shuffle and share.
_VECTOR_BYTES, _VECTOR_ROWS, _VECTOR_MEMBERS = 4 << 20, 16_384, 64
# Larger images are stored one per member, as PNG: a block would no longer save much.
_SINGLE_BYTES = 100_000

Block = dict[str, np.ndarray]


def read_member(manifest: Manifest, shard: ShardRecord, number: int, *, labels_only: bool = False) -> Block:
    """One member of a shard, checked and decoded: "x" [rows, *shape], perhaps "label" [rows] int64.

    All of its files are fetched by one request, as they lie side by side; with `labels_only` the label's alone.

    Raises:
        UserError: the bytes are not those of the manifest.
    """
    rows, fields = shard.members[number]
    if labels_only:
        fields = {field: place for field, place in fields.items() if _name_of(field) == "label"}
    start = min(offset for offset, _, _ in fields.values())
    stop = max(offset + length for offset, length, _ in fields.values())
    data = memoryview(storage.read_range(manifest.shard_url(shard), start, stop - start))
    block = {}
    for field, (offset, length, checksum) in fields.items():
        content = data[offset - start : offset - start + length]
        if len(content) != length or zlib.crc32(content) != checksum:
            raise damaged(manifest, shard, f"member {number}, {field!r}")
        try:
            name, block[_name_of(field)] = _name_of(field), _decode(field, content)
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            raise damaged(manifest, shard, f"member {number}, {field!r}: {error}") from error
        if len(block[name]) != rows:
            raise damaged(manifest, shard, f"member {number}, {field!r}: {len(block[name])} rows instead of {rows}")
    if labels_only:
        return block
    if "x" not in block or block["x"].shape[1:] != manifest.shape or block["x"].dtype != manifest.dtype:
        raise damaged(manifest, shard, f"member {number} does not hold samples of shape {manifest.shape}")
    return block


def parse_npy(data: bytes | memoryview) -> np.ndarray:
    """The array of a .npy file in memory: a view where `data` may be written to, else a copy.

    Raises:
        ValueError: damaged, announcing another size than it has, or holding Python objects.
    """
    stream = io.BytesIO(data[: 12 + int.from_bytes(data[8:10], "little")])
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"npy version {version} is not read")
    try:
        shape, by_column, dtype = readers[version](stream)
    except Exception as error:  # its parser has several kinds of exceptions, MemoryError among them
        raise ValueError("damaged header") from error
    if dtype.hasobject:
        raise ValueError("an array of Python objects is never read")
    # Compared before anything is allocated: a header can announce more than the machine has.
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"the header announces the shape {shape}, the data is {len(data) - stream.tell()} bytes")
    flat = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if by_column else "C")
    return flat if flat.flags.writeable and flat.flags.aligned else flat.copy()


def _name_of(field: str) -> str:
    return {"png": "x", "cls": "label"}.get(field, field.removesuffix(".npy"))


def _decode(field: str, content: memoryview) -> np.ndarray:
    if field == "png":
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            pixels = np.asarray(image)
        return pixels.reshape(1, *pixels.shape[:2], -1)
    if field == "cls":
        return np.array([int(bytes(content))], dtype=np.int64)
    return parse_npy(content)


def encode(block: Block) -> dict[str, bytes]:
    """{field: bytes} of one member, in the extensions that WebDataset knows."""
    x = block["x"]
    if len(x) == 1 and x.nbytes > _SINGLE_BYTES and x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] in (1, 3):
        stream = io.BytesIO()
        Image.fromarray(x[0, :, :, 0] if x.shape[3] == 1 else x[0]).save(stream, "PNG")
        fields = {"png": stream.getvalue()}
        if "label" in block:
            fields["cls"] = str(int(block["label"][0])).encode()
        return fields
    fields = {}
    for name, values in block.items():
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)
        fields[f"{name}.npy"] = stream.getvalue()
    return fields


def block_rows(shape: tuple[int, ...], dtype: str, limit: int | None = None, n_samples: int = 0) -> int:
    """Samples per member: `limit`, or fewer where a block would become too large, one above 100 kB each.

    Without a limit 1000, within a mebibyte; for vectors a 64th of the `n_samples` that there are, where that is more,
    up to 16,384 within four mebibytes.
    """
    row_bytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    if row_bytes > _SINGLE_BYTES:
        return 1
    most = (_VECTOR_BYTES if len(shape) == 1 else _BLOCK_BYTES) // row_bytes
    if limit is not None:
        return max(1, min(limit, most))
    rows = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // row_bytes))
    return max(rows, min(n_samples // _VECTOR_MEMBERS, most, _VECTOR_ROWS)) if len(shape) == 1 else rows


def join(parts: list[Block]) -> Block:
    """One block of all rows; a lone one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def regroup(blocks: Iterable[Block], limit: int | None, n_samples: int = 0) -> Iterator[Block]:
    """The same rows in blocks of even size (see `block_rows`), whatever the sizes that come in."""
    waiting: list[Block] = []
    n_waiting = 0
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            waiting.append(block)
            n_waiting += len(block["x"])
        if not n_waiting:
            continue
        x = waiting[0]["x"]
        rows = block_rows(x.shape[1:], x.dtype.str, limit, n_samples)
        if n_waiting < rows and block is not None:
            continue
        joined = join(waiting)
        stop = n_waiting if block is None else n_waiting // rows * rows
        for start in range(0, stop, rows):
            yield {name: values[start : min(start + rows, stop)] for name, values in joined.items()}
        waiting, n_waiting = [{name: values[stop:] for name, values in joined.items()}], n_waiting - stop
