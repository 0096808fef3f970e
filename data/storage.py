"""Files at local paths and fsspec URLs: which ones are allowed, reading, and writing whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
import numpy as np

from data.errors import StorageError, UserError, io_error, one_line

# Schemes that only move bytes. `pipe:` would run a shell command; chained URLs (`a::b`) could smuggle one in.
ALLOWED_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "az", "hdfs", "http", "https", "memory")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*):")
# Packages whose exceptions reach us through fsspec without being OSErrors: no credentials, a broken connection.
_STORES = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")


def check_url(url: str) -> str:
    """Returns `url` with local paths made absolute; refuses anything that is not a plain path or an allowed scheme.

    Raises:
        UserError: an empty URL, a chained URL, a name that no file can have, or a scheme outside `ALLOWED_SCHEMES`
            (above all `pipe:`).
    """
    text = str(url).strip()
    if not text:
        raise UserError("an empty path was given: name a folder, a file or a URL")
    if "::" in text:
        raise UserError(f"refused {text!r}: chained URLs are not allowed; give one plain path or URL")
    scheme = _SCHEME.match(text)
    if scheme is None:
        return _local_path(os.path.expanduser(text))
    if scheme.group(1).lower() not in ALLOWED_SCHEMES:
        raise UserError(
            f"refused {text!r}: shards are never read through {scheme.group(1)!r}; "
            f"use a path or one of {', '.join(ALLOWED_SCHEMES)}"
        )
    if scheme.group(1).lower() == "file":
        return _local_path(re.sub(r"^file:(//)?", "", text, flags=re.IGNORECASE))
    try:
        urlsplit(text)
    except ValueError as error:
        raise UserError(f"refused {text!r}: {one_line(error)}; give a path or SCHEME://HOST/PATH") from error
    return text


def _local_path(path: str) -> str:
    """An absolute path; refuses names that no file can have, which else fail in every call in another way."""
    whole = os.path.abspath(path)
    try:
        parts = os.fsencode(whole).split(b"/")
    except UnicodeEncodeError:
        parts = [b"\0"]
    # Braces stand for several names: each is checked when they are expanded.
    if any(b"\0" in part or (len(part) > 255 and b"{" not in part) for part in parts):
        raise UserError(f"refused {path!r}: no file can have this name; give another")
    return whole


def check_name(name: str) -> str:
    """The name, where it can be written into a manifest.

    Raises:
        UserError: it holds bytes that are not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"refused the name {name!r}: it is not UTF-8; rename the file or folder") from None
    return name


def is_local(url: str) -> bool:
    """Whether a checked URL is a path on this machine."""
    return _SCHEME.match(url) is None


def join(base: str, *names: str) -> str:
    """Joins names below a folder given as path or URL; refuses names that would leave the folder."""
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or _SCHEME.match(name):
            raise UserError(f"refused the name {name!r} below {base}: it points outside of the folder")
    return posixpath.join(base, *names)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a checked URL and the path in it.

    Raises:
        UserError: the scheme needs a package that is not installed (s3fs, gcsfs, ...).
    """
    try:
        fs, path = fsspec.core.url_to_fs(check_url(url))
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"cannot use {url}: {error}") from error
    return fs, path


@contextlib.contextmanager
def _told(url: str, doing: str) -> Iterator[None]:
    """Turns what a disk or a store says against `doing` something with `url` into one line."""
    try:
        yield
    except OSError as error:
        raise io_error(error, url, doing) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _STORES:
            raise
        raise StorageError(
            f"cannot {doing} {url}: {one_line(error).rstrip('.')}; check the address, and the credentials of the store"
        ) from error


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading bytes, with random access where the store offers it."""
    with _told(url, "read"):
        fs, path = filesystem(url)
        handle = fs.open(path, "rb")
    with handle:
        yield handle


def read_bytes(url: str) -> bytes:
    """The whole file."""
    with _told(url, "read"), open_read(url) as handle:
        return handle.read()


def read_range(url: str, offset: int, length: int) -> bytes | memoryview:
    """`length` bytes from `offset` on in one request; fewer where the file ends before.

    Of a local file a view of fresh memory, which arrays may keep and write to without a copy.
    """
    checked = check_url(url)
    with _told(url, "read"):
        if is_local(checked):
            # Not more than is there: the length may come from a file that lies.
            with open(checked, "rb", buffering=0) as handle:
                length = max(0, min(length, os.fstat(handle.fileno()).st_size - offset))
                buffer = np.empty(length, np.uint8).data
                handle.seek(offset)
                done = 0
                while done < length and (read := handle.readinto(buffer[done:])):
                    done += read
                return buffer[:done]
        fs, path = filesystem(url)
        return bytes(fs.cat_file(path, start=offset, end=offset + length))


@contextlib.contextmanager
def publish(url: str) -> Iterator[IO[bytes]]:
    """Writes a file that appears whole or not at all: beside its place and renamed, or committed by the store.

    Raises:
        UserError: the disk is full, the place may not be written, ...
    """
    fs, path = filesystem(url)
    local = is_local(check_url(url))
    target = f"{path}.partial-{uuid.uuid4().hex[:12]}" if local else path
    handle: Any = None
    try:
        if local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handle = open(target, "wb")  # noqa: SIM115 (closed on both ways out, below)
        else:
            handle = fs.open(path, "wb", autocommit=False)
        yield handle
        handle.close()
        if local:
            os.replace(target, path)
        else:
            handle.commit()
    except BaseException as error:
        if handle is not None:
            with contextlib.suppress(Exception):
                handle.close()
            with contextlib.suppress(Exception):
                os.unlink(target) if local else handle.discard()
        if isinstance(error, NotImplementedError):  # how fsspec's HTTP file system says that it only reads
            raise UserError(f"cannot write {url}: such a store can only be read; give a path or another URL") from error
        with _told(url, "write"):
            raise


def write_text(url: str, text: str) -> None:
    """Writes a text file whole or not at all."""
    with publish(url) as handle:
        handle.write(text.encode(errors="backslashreplace"))  # a file name in it may be no text


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(url)
    with _told(url, "look for"):
        fs.invalidate_cache(posixpath.dirname(path.rstrip("/")))
        return bool(fs.exists(path))


def names(url: str) -> list[str]:
    """Sorted names of what lies in a folder; empty where there is no such folder."""
    fs, path = filesystem(url)
    with _told(url, "list"):
        try:
            # A store may answer from memory what another process has changed since.
            fs.invalidate_cache(path)
            return sorted(posixpath.basename(str(entry).rstrip("/")) for entry in fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []


def size(url: str) -> int:
    """Bytes of a file."""
    fs, path = filesystem(url)
    with _told(url, "read"):
        return int(fs.size(path))


# What stores say of a file's content, the surest first.
_MARKS = ("md5Hash", "content_md5", "Content-MD5", "checksum", "ETag", "etag", "generation")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


def mark(url: str) -> tuple[int, str | None]:
    """Bytes of a file, and its checksum, ETag or time of change; None where the store tells none of them."""
    fs, path = filesystem(url)
    with _told(url, "read"):
        found = fs.info(path)
        n_bytes = found.get("size")
        known = next((f"{name} {found[name]}" for name in (*_MARKS, *_TIMES) if found.get(name)), None)
        return int(fs.size(path) if n_bytes is None else n_bytes), known


def sha256(url: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with _told(url, "read"), open_read(url) as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def remove(url: str) -> None:
    """Removes a file or a folder with all that is in it; nothing happens where there is none."""
    fs, path = filesystem(url)
    with _told(url, "remove"), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """A folder as one on this machine: itself, or a temporary copy of what a URL holds."""
    if is_local(url):
        yield Path(url)
        return
    fs, path = filesystem(url)
    with tempfile.TemporaryDirectory() as place:
        with _told(url, "read"):
            fs.get(path.rstrip("/") + "/", place, recursive=True)
        yield Path(place)


def local_folder(url: str) -> Path:
    """A checked URL as a local folder.

    Raises:
        UserError: the URL is not on this machine.
    """
    checked = check_url(url)
    if not is_local(checked):
        raise UserError(f"{url} is not a local folder: give a path on this machine")
    return Path(checked)
