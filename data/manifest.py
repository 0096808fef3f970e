"""The manifest of a pack: what the data is, which shards hold it, and where in them every member lies."""

from __future__ import annotations

import hashlib
import json
import posixpath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from data import storage
from data.errors import UserError

MANIFEST = "manifest.json"
_LABELS = {"label.npy", "cls"}
# Rows of a member, and of each of its files (offset, bytes, CRC-32) in the shard.
Member = tuple[int, dict[str, tuple[int, int, int]]]


class ShardRecord(BaseModel):
    """One shard: its size, its checksum and the place of every member."""

    model_config = ConfigDict(extra="forbid")

    file: str = Field(pattern=r"^[^\x00-\x1f\\]+$", description="name in the folder of the manifest")
    samples: int = Field(ge=1, description="rows of all members")
    bytes: int = Field(ge=1, description="size of the file")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="checksum of the file")
    members: list[Member] = Field(description="[rows, {field: [offset, bytes, CRC-32]}] in the order of the file")

    @model_validator(mode="after")
    def _consistent(self) -> ShardRecord:
        if self.samples != sum(rows for rows, _ in self.members):
            raise ValueError(f"{self.file}: the members do not add up to {self.samples} samples")
        if any(rows < 1 or not fields for rows, fields in self.members):
            raise ValueError(f"{self.file}: a member is empty")
        if any(rows > sum(length for _, length, _ in fields.values()) for rows, fields in self.members):
            raise ValueError(f"{self.file}: a member has more rows than bytes")
        places = [place for _, fields in self.members for place in fields.values()]
        if any(offset < 0 or length < 0 or offset + length > self.bytes for offset, length, _ in places):
            raise ValueError(f"{self.file}: a member lies outside of the shard")
        return self


class SplitRecord(BaseModel):
    """The shards of one split."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(ge=0)
    shards: list[ShardRecord]

    @model_validator(mode="after")
    def _consistent(self) -> SplitRecord:
        if self.samples != sum(shard.samples for shard in self.shards):
            raise ValueError(f"the shards do not add up to {self.samples} samples")
        return self


class Origin(BaseModel):
    """What was packed."""

    model_config = ConfigDict(extra="forbid")

    spec: str
    options: dict[str, Any] = Field(default_factory=dict)
    stamp: str = Field("", description="of the source's files when they were packed")


class Manifest(BaseModel):
    """What a pack holds; stored beside its shards, written last."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    name: str
    shape: tuple[int, ...] = Field(description="of one sample, channels last")
    dtype: Literal["uint8", "float32"]
    levels: int | None = Field(None, ge=2, le=256, description="values of a pixel; null for real numbers")
    class_names: tuple[str, ...] | None = None
    source: Origin
    splits: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], SplitRecord]
    _base: str = PrivateAttr("")

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if (self.dtype == "uint8") != (self.levels is not None):
            raise ValueError("levels belong to uint8 and to nothing else")
        members = [member for record in self.splits.values() for shard in record.shards for member in shard.members]
        if len({bool(_LABELS & set(fields)) for _, fields in members}) > 1:
            raise ValueError("some members have labels and some have none")
        return self

    @property
    def base(self) -> str:
        """The folder that the manifest was loaded from or saved to; not stored in it."""
        return self._base

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what identifies the data: shape, dtype, levels and the checksum of every shard."""
        splits = {split: [shard.sha256 for shard in record.shards] for split, record in self.splits.items()}
        identity = [self.shape, self.dtype, self.levels, splits]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def has_labels(self) -> bool:
        """Whether every sample carries a label."""
        members = (shard.members[0] for record in self.splits.values() for shard in record.shards)
        return any(_LABELS & set(fields) for _, fields in members)

    def split(self, name: str) -> SplitRecord:
        """The record of one split.

        Raises:
            UserError: there is no such split, or it holds no samples.
        """
        if name not in self.splits:
            raise UserError(f"{self.base}: no split {name!r}: choose one of {', '.join(self.splits)}")
        if not self.splits[name].samples:
            raise UserError(f"{self.base}: the split {name!r} is empty: choose another or pack again")
        return self.splits[name]

    def n_samples(self, split: str) -> int:
        """Samples of a split; raises as `split` does."""
        return self.split(split).samples

    def shard_url(self, shard: ShardRecord) -> str:
        """Where a shard lies."""
        return storage.join(self.base, shard.file)


def save_manifest(manifest: Manifest, dest: str) -> Manifest:
    """Writes `manifest.json` into `dest`, where its shards must lie already; returns it with `base` set."""
    manifest = manifest.model_copy()
    manifest._base = storage.check_url(dest)
    storage.write_text(storage.join(manifest.base, MANIFEST), manifest.model_dump_json() + "\n")
    return manifest


def load_manifest(url: str) -> Manifest:
    """Reads the manifest of a pack, given as its folder or as the file `manifest.json` itself.

    Raises:
        UserError: no manifest there, another version of the format, or contents that contradict each other.
    """
    url = storage.check_url(url)
    base = posixpath.dirname(url) if posixpath.basename(url) == MANIFEST else url.rstrip("/")
    url = storage.join(base, MANIFEST)
    if not storage.exists(url):
        raise UserError(f"{base}: no {MANIFEST} there: pack a source into this folder first or check the path")
    try:
        content = json.loads(storage.read_bytes(url))
        if isinstance(content, dict) and content.get("format") != 1:
            raise UserError(
                f"{url}: format {content.get('format')!r} is unknown, only 1 is read: pack again with this version"
            )
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(repr(part) for part in first["loc"][:4]) or "contents"
        raise UserError(f"{url}: not a valid manifest ({place}: {first['msg']}): pack again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{url}: not a valid manifest (no JSON): pack again") from error
    manifest._base = base
    for record in manifest.splits.values():
        for shard in record.shards:
            manifest.shard_url(shard)  # refuses names that leave the folder
    return manifest


def verify(manifest: Manifest) -> None:
    """Reads every shard and compares size and SHA-256 with the manifest.

    Raises:
        UserError: names the first shard that is missing or differs.
    """
    for record in manifest.splits.values():
        for shard in record.shards:
            check_size(manifest, shard)
            if storage.sha256(manifest.shard_url(shard)) != shard.sha256:
                raise damaged(manifest, shard, "its SHA-256 differs")


def check_size(manifest: Manifest, shard: ShardRecord) -> None:
    """Raises UserError if the size of a shard is not that of the manifest."""
    size = storage.size(manifest.shard_url(shard))
    if size != shard.bytes:
        raise damaged(manifest, shard, f"{size} bytes instead of {shard.bytes}")


def damaged(manifest: Manifest, shard: ShardRecord, reason: str) -> UserError:
    """The error for a shard that is not what the manifest says."""
    return UserError(f"{manifest.base}: shard {shard.file} is truncated or changed ({reason}): pack again")
