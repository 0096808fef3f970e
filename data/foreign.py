"""WebDataset shards of others, without a manifest: read through the webdataset library, trusting nothing."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import webdataset
from webdataset.tariterators import group_by_keys

from data import images, storage
from data.errors import UserError, io_error
from data.members import parse_npy

MAX_MEMBER_BYTES = 256 << 20
_MAX_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_urls(urls: Iterable[str]) -> list[str]:
    """Expands `{000..123}` and `{a,b}` in every URL and checks each result with `storage.check_url`.

    Raises:
        UserError: a refused URL, braces that are neither a range nor a list, or no URL at all.
    """
    found = []
    for url in urls:
        storage.check_url(url)
        found += [storage.check_url(each) for each in _expand(url)]
    if not found:
        raise UserError("no shards were named: give at least one .tar file")
    return found


def _expand(url: str) -> list[str]:
    found, place = [""], 0
    for braces in _BRACES.finditer(url):
        choices = _choices(url, braces[1])
        if len(found) * len(choices) > _MAX_SHARDS:
            raise UserError(f"{url}: the braces stand for more than {_MAX_SHARDS:,} names: write fewer")
        between = url[place : braces.start()]
        found = [head + between + choice for head in found for choice in choices]
        place = braces.end()
    return [head + url[place:] for head in found]


def _choices(url: str, braces: str) -> list[str]:
    limits = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", braces)
    if limits:
        first, last = int(limits[1]), int(limits[2])
        if not 0 <= last - first < _MAX_SHARDS:
            raise UserError(f"{url}: the range {{{braces}}} is backwards or too long: write {{000..123}}")
        # As in a shell, a leading zero asks for equal widths.
        padded = len(limits[1]) if limits[1].startswith("0") else 0
        return [f"{number:0{padded}d}" for number in range(first, last + 1)]
    if "," not in braces:
        raise UserError(f"{url}: {{{braces}}} is neither a range {{000..123}} nor a list {{a,b}}: correct it")
    return braces.split(",")


def read_webdataset(urls: list[str], *, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Any]]:
    """Samples of third-party shards: images and arrays, never pickles.

    Shards are dealt out to ranks, then to loader workers; a rank beyond the number of shards gets nothing.

    Args:
        urls: paths or URLs of uncompressed tars, braces allowed.
        rank, world_size: which share.

    Yields:
        "x" (uint8 [height, width, channels] from .png, .jpg or .jpeg, else the array of .npy), "label" (int, from
        .cls or from "label" in .json, where present), "key" and "url".

    Raises:
        UserError: a refused URL, a truncated or damaged shard, a member that is refused (too large, a link,
            sparse), or a sample that cannot be decoded (arrays of anything but real numbers and labels beyond 64
            bits among them).
    """

    def split_by_rank(sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return itertools.islice(sources, rank, None, world_size)

    stages = [split_by_rank, webdataset.split_by_worker, _files, group_by_keys]
    try:
        for sample in webdataset.DataPipeline(webdataset.SimpleShardList(expand_urls(urls)), *stages):
            yield _decode(sample)
    except ValueError as error:
        # group_by_keys: one name twice in a sample.
        raise UserError(f"{', '.join(urls)}: {error.args[0]}: write the shards again") from error


class _StrictTarInfo(tarfile.TarInfo):
    """A tar header of which any fault is an error: tarfile itself takes most of them for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        info = super().frombuf(buf, encoding, errors)
        # Checked here, before anything of that size is read: long names and extended headers come this way too.
        if not 0 <= info.size <= MAX_MEMBER_BYTES:
            raise tarfile.ReadError(f"{info.name!r} announces {info.size} bytes")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{info.name!r} is a sparse file")
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            # The exceptions' own classes are not in tarfile's interface; only the regular end is let through.
            if type(error).__name__ != "EOFHeaderError":
                raise tarfile.ReadError(str(error)) from None
            # A block of zeros ends an archive, but only if nothing but zeros follows.
            stream: Any = tarfile_.fileobj
            while rest := stream.read(1 << 16):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("a header in the middle is zero") from None
            raise


def _files(sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Stage of the pipeline: {"fname", "data", "__url__"} of every file, and {} where a shard ends."""
    for source in sources:
        url = source["url"]
        try:
            with (
                storage.open_read(url) as handle,
                tarfile.open(fileobj=handle, mode="r|", tarinfo=_StrictTarInfo) as tar,
            ):
                for member in tar:
                    if not member.isdir():
                        yield {"fname": member.name, "data": _content(tar, member), "__url__": url}
                    vars(tar)["members"].clear()  # else every header of the shard stays in memory
        except tarfile.TarError as error:
            raise UserError(f"{url}: truncated or damaged shard ({error}): fetch it again") from error
        except OSError as error:
            raise io_error(error, url, "read") from error
        yield {}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if stream is None or member.size > MAX_MEMBER_BYTES or member.name.endswith(".__bad__"):
        raise tarfile.ReadError(f"refused {member.name!r}: not a plain file, or above {MAX_MEMBER_BYTES >> 20} MiB")
    data = stream.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name!r} ends early")
    return data


def _decode(sample: dict[str, Any]) -> dict[str, Any]:
    name = f"{sample['__url__']}: sample {sample['__key__']!r}"
    out: dict[str, Any] = {"key": sample["__key__"], "url": sample["__url__"]}
    decoders: dict[str, Callable[[bytes], np.ndarray]] = {
        suffix: lambda data: images.fit(images.decode(io.BytesIO(data), name, None), None, None)
        for suffix in ("png", "jpg", "jpeg")
    }
    decoders["npy"] = _numbers
    suffix = next((suffix for suffix in decoders if suffix in sample), None)
    if suffix is None:
        raise UserError(f"{name} has no .{', .'.join(decoders)}: nothing else is read as data")
    try:
        out["x"] = decoders[suffix](sample[suffix])
        if "cls" in sample:
            out["label"] = _label(int(sample["cls"]))
        elif "json" in sample:
            content = json.loads(sample["json"])
            if isinstance(content, dict) and isinstance(content.get("label"), int):
                out["label"] = _label(content["label"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be decoded ({error}): repair or remove it") from error
    return out


def _numbers(data: bytes) -> np.ndarray:
    x = parse_npy(data)
    if x.dtype.kind not in "fiub":
        raise ValueError(f"values of type {x.dtype} are no real numbers")
    return x


def _label(number: int) -> int:
    if not -(2**63) <= number < 2**63:
        raise ValueError("the label does not fit 64 bits")
    return number
