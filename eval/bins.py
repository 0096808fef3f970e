"""K-means bins over a reference set: fitted once, kept as an artefact, the yardstick for every model's samples.

Source: E. Richardson and Y. Weiss, "On GANs and GMMs", NeurIPS 2018, supplement section 1.1.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from scipy import sparse

from data import kmeans, storage
from data.errors import UserError
from data.limits import MAX_MAGNITUDE, MAX_SEED

# Rows are handled in blocks of about this many bytes: memory stays flat, and float32 sums stay short (see _means).
_BLOCK_BYTES = 32 * 2**20


class BinSettings(BaseModel):
    """How the bins are made. The defaults are the paper's, with all samples and all dimensions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_bins: int = Field(100, ge=2, description="number of bins, K")
    max_samples: int | None = Field(None, ge=1, description="cluster so many random samples; empty: all")
    max_dimensions: int | None = Field(None, ge=1, description="cluster so many random dimensions; empty: all")
    n_init: int = Field(10, ge=1, description="K-means initialisations; the best one is kept")
    whiten: bool = Field(False, description="divide each feature by the reference's standard deviation")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the subsets and the initialisations")


@dataclass(frozen=True)
class Bins:
    """K bins over samples of one shape, largest first.

    `centres` `[K, d]` float32 are means in the full dimension and in the reference's own units; `dimensions` `[m]`
    are the features that distances are measured in; `std` `[d]` is what they are divided by first, or None;
    `counts` `[K]` are the reference's (empty bins are kept). A sample belongs to the nearest centre.
    """

    centres: np.ndarray
    dimensions: np.ndarray
    std: np.ndarray | None
    counts: np.ndarray
    shape: tuple[int, ...]
    value_range: tuple[float, float]
    settings: BinSettings
    reference_name: str
    reference_fingerprint: str

    @property
    def n_reference(self) -> int:
        """Samples in the reference."""
        return int(self.counts.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the arrays and the facts: equal where, and only where, the bins are the same."""
        digest = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def check(self, x: np.ndarray, name: str) -> np.ndarray:
        """Samples as float32 `[n, *shape]`.

        Raises:
            UserError: another shape than the reference's, or values that are not finite.
        """
        values = _as_float32(x, name)
        if values.shape[1:] != self.shape:
            raise UserError(
                f"{name}: the reference is {_spelled(self.shape)}, the samples are {_spelled(values.shape[1:])}: "
                "bring the samples to the reference's shape"
            )
        _value_range(values, name)
        return values

    def assign(self, x: np.ndarray) -> np.ndarray:
        """The bin `[n]` int64 of every sample `[n, *shape]`.

        Raises:
            UserError: another shape than the reference's, or values that are not finite.
        """
        values = self.check(x, "samples")
        return _assign(values.reshape(len(values), -1), self.centres, self.dimensions, self.std)

    def count(self, x: np.ndarray) -> np.ndarray:
        """Samples per bin, `[K]` int64; counts of parts of a set may be added.

        Raises:
            UserError: as `assign`.
        """
        return np.bincount(self.assign(x), minlength=len(self.counts)).astype(np.int64)

    def save(self, folder: str) -> None:
        """Writes `bins.safetensors` and then `bins.json` into a folder given as path or URL.

        Raises:
            UserError: the folder cannot be written.
        """
        with storage.publish(storage.join(folder, "bins.safetensors")) as handle:
            handle.write(save_tensors(self._arrays()))
        facts = {**self._facts(), "fingerprint": self.fingerprint}
        storage.write_text(storage.join(folder, "bins.json"), json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str) -> Bins:
        """Reads what `save` wrote.

        Raises:
            UserError: nothing there, or files that do not belong together or were changed.
        """
        described = storage.read_bytes(storage.join(folder, "bins.json"))
        tensors = storage.read_bytes(storage.join(folder, "bins.safetensors"))
        try:
            facts, arrays = json.loads(described), load_tensors(tensors)
            bins = cls(
                centres=arrays["centres"],
                dimensions=arrays["dimensions"],
                std=arrays.get("std"),
                counts=arrays["counts"],
                shape=tuple(facts["shape"]),
                value_range=(facts["value_range"][0], facts["value_range"][1]),
                settings=BinSettings(**facts["settings"]),
                reference_name=facts["reference_name"],
                reference_fingerprint=facts["reference_fingerprint"],
            )
            intact = bins.fingerprint == facts["fingerprint"]
        except (KeyError, IndexError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"cannot read the bins in {folder}: {error!r}; fit them again") from error
        if not intact:
            raise UserError(f"the bins in {folder} were changed or written in part: fit them again")
        return bins

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"centres": self.centres, "dimensions": self.dimensions, "counts": self.counts}
        return arrays if self.std is None else {**arrays, "std": self.std}

    def _facts(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "value_range": list(self.value_range),
            "settings": self.settings.model_dump(),
            "reference_name": self.reference_name,
            "reference_fingerprint": self.reference_fingerprint,
        }


def fit_bins(
    reference: np.ndarray, settings: BinSettings, *, reference_name: str, reference_fingerprint: str
) -> Bins:
    """Fits bins to a reference set `[n, *shape]` float32 (other number types are converted).

    K-means over a random subset of samples and dimensions, best of `n_init` starts; every sample then goes to its
    nearest centroid, and each centre becomes the mean of all its samples in the full dimension. One more
    assignment, to these final centres, gives the counts, so that reference and samples are counted by one rule.

    With `whiten`, features are divided by their standard deviation over the reference. A feature that is constant
    in the reference (up to float32 rounding) is divided by 1: it adds the same to every distance, and so decides
    nothing.

    Raises:
        UserError: fewer samples than bins, values that are not finite, or fewer clustered samples than bins.
    """
    values = _as_float32(reference, reference_name)
    n, n_bins = len(values), settings.n_bins
    used = min(n, settings.max_samples or n)
    if used < n_bins:
        raise UserError(f"{reference_name}: {used} samples for {n_bins} bins: use more samples or fewer bins")
    value_range = _value_range(values, reference_name)
    flat = values.reshape(n, -1)
    std = _feature_std(flat) if settings.whiten else None
    found = kmeans.fit(
        flat if std is None else flat / std,
        n_bins,
        n_init=settings.n_init,
        max_samples=settings.max_samples,
        max_dimensions=settings.max_dimensions,
        seed=settings.seed,
    )
    dimensions = np.asarray(found.dimensions, np.int64)
    # K-means knows the used dimensions alone; a centroid without samples keeps the overall mean in the others.
    start = np.tile(flat.mean(axis=0), (n_bins, 1))
    start[:, dimensions] = found.centroids if std is None else found.centroids * std[dimensions]
    centres = _means(flat, _assign(flat, start, dimensions, std), start)
    counts = np.bincount(_assign(flat, centres, dimensions, std), minlength=n_bins)
    order = np.argsort(-counts, kind="stable")
    return Bins(
        centres=centres[order],
        dimensions=dimensions,
        std=std,
        counts=counts[order].astype(np.int64),
        shape=values.shape[1:],
        value_range=value_range,
        settings=settings,
        reference_name=reference_name,
        reference_fingerprint=reference_fingerprint,
    )


def _assign(flat: np.ndarray, centres: np.ndarray, dimensions: np.ndarray, std: np.ndarray | None) -> np.ndarray:
    """The nearest centre `[n]` of every row, in the used dimensions divided by `std`."""
    every = len(dimensions) == flat.shape[1]

    def prepared(rows: np.ndarray) -> np.ndarray:
        part = rows if every else rows[:, dimensions]
        return np.ascontiguousarray(part if std is None else part / (std if every else std[dimensions]))

    targets = prepared(centres)
    return np.concatenate([kmeans.assign(prepared(flat[rows]), targets)[0] for rows in _blocks(flat)])


def _means(flat: np.ndarray, labels: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The mean of every label's rows, `[K, d]` float32; `start` where a label has none.

    One sparse product per block, summed in float32 within a block and in float64 between blocks.
    """
    totals = np.zeros(start.shape, np.float64)
    for rows in _blocks(flat):
        members = labels[rows]
        entries = (np.ones(len(members), np.float32), (members, np.arange(len(members))))
        totals += sparse.csr_array(entries, shape=(len(start), len(members))) @ flat[rows]
    counts = np.bincount(labels, minlength=len(start))[:, None]
    return np.where(counts > 0, totals / np.maximum(counts, 1), start).astype(np.float32)


def _feature_std(flat: np.ndarray) -> np.ndarray:
    """Standard deviation `[d]` float32 of every feature in two float64 passes, 1 where the feature is constant."""
    mean = sum(flat[rows].sum(axis=0, dtype=np.float64) for rows in _blocks(flat)) / len(flat)
    variance = sum(np.square(flat[rows] - mean).sum(axis=0) for rows in _blocks(flat)) / len(flat)
    std = np.sqrt(variance)
    return np.where(std > np.finfo(np.float32).eps * np.abs(mean), std, 1.0).astype(np.float32)


def _blocks(flat: np.ndarray) -> Iterator[slice]:
    """Slices of rows, each of about `_BLOCK_BYTES`."""
    rows = max(1, _BLOCK_BYTES // max(1, flat[:1].nbytes))
    return (slice(start, start + rows) for start in range(0, len(flat), rows))


def _as_float32(x: np.ndarray, name: str) -> np.ndarray:
    """Samples as contiguous float32, without a copy where they are that already."""
    try:
        values = np.ascontiguousarray(x, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: samples must be numbers of one shape: {error}") from error
    if values.ndim < 2 or math.prod(values.shape) == 0:
        raise UserError(f"{name}: samples must have the shape [n, ...] and not be empty, got {list(values.shape)}")
    return values


def _value_range(values: np.ndarray, name: str) -> tuple[float, float]:
    """Smallest and largest value; minimum and maximum carry NaN, so that two passes need no mask in memory."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name}: the samples hold NaN or infinite values: remove them first")
    if max(abs(low), abs(high)) > MAX_MAGNITUDE:
        raise UserError(f"{name}: the samples hold values beyond {MAX_MAGNITUDE:g} in size: rescale them first")
    return low, high


def _spelled(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape) or "single numbers"
