"""Bins over a reference set: fitted once, kept as an artefact, the yardstick for every model's samples.

Source: E. Richardson and Y. Weiss, "On GANs and GMMs", NeurIPS 2018, supplement section 1.1.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from scipy import sparse

from data import kmeans, storage
from data.errors import UserError
from data.limits import MAX_SEED
from eval.canvas import is_image
from eval.observed import MAX_CLASSES, Digest, Extent, Observed, Pass, Sketch, Space, Spread, moved

# Pictures of members that travel with the bins: no more than these bytes, and no more of a bin than these. Each may
# cost a request to a store: no more than so many in all.
_PICTURED_BYTES = 64 << 20
MEMBERS = 8
PICTURED = 1000
# Rows are handled in blocks of about this many bytes: memory stays flat, and float32 sums stay short (see CentreSums).
_BLOCK_BYTES = 32 << 20


class BinSettings(BaseModel):
    """How the bins are made. The defaults are the paper's, with all samples and all dimensions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_bins: int = Field(100, ge=2, description="number of bins, K")
    max_samples: int | None = Field(
        None, ge=1, description="cluster so many random samples; null: all that fit into 1 GiB"
    )
    max_dimensions: int | None = Field(None, ge=1, description="cluster so many random dimensions; null: all")
    n_init: int = Field(10, ge=1, description="K-means initialisations; the best one is kept")
    whiten: bool = Field(False, description="divide each feature by the reference's standard deviation")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the subsets and the initialisations")


@dataclass(frozen=True)
class Bins:
    """K bins over samples of one shape, largest first.

    `centres` `[K, d]` float32 are means in the full dimension and in the reference's own units; `dimensions` `[m]`
    are the features that distances are measured in; `std` `[d]` is what they are divided by first, or None;
    `counts` `[K]` are the reference's (empty bins are kept). A sample belongs to the nearest centre. Where the bins
    are classes, `centres` is None and a sample belongs to the bin of its label, given with it or said by a classifier:
    `labelled_by` tells.

    `members` `[K, m]` are positions in the reference of some members of every bin (-1: none), `pictures`
    `[K, m, *shape]` the same members themselves, where they are kept.
    """

    centres: np.ndarray | None
    dimensions: np.ndarray
    std: np.ndarray | None
    counts: np.ndarray
    shape: tuple[int, ...]
    value_range: tuple[float, float]
    root_mean_square: float
    settings: BinSettings
    clustered: int
    reference_name: str
    reference_fingerprint: str
    space: Space = field(default_factory=Space)
    members: np.ndarray | None = None
    pictures: np.ndarray | None = None
    labelled_by: Space | None = None

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

    def assign(self, seen: Observed) -> tuple[np.ndarray, np.ndarray | None]:
        """The bin `[n]` int64 of every sample and its squared distance to the centre (None for given labels).

        Raises:
            UserError: another shape than the reference's, values that are not finite, or, where bins are classes, no
                labels or other ones.
        """
        if seen.x.shape[1:] != self.shape:
            raise UserError(
                f"the reference is {_spelled(self.shape)}, the samples are {_spelled(seen.x.shape[1:])}: "
                "bring the samples to the reference's shape"
            )
        if self.centres is None:
            return _labels(seen, len(self.counts), self.labelled_by), None
        if seen.features.shape[1] != self.centres.shape[1]:
            raise UserError(
                f"the bins are of {self.centres.shape[1]} features ({self.space.name}), the samples have "
                f"{seen.features.shape[1]}: take the features that the bins were fitted to"
            )
        return _assign(seen.features, self.centres, self.dimensions, self.std)

    def without_pictures(self) -> Bins:
        """The same bins, light enough to be sent to workers."""
        return replace(self, members=None, pictures=None)

    def save(self, folder: str) -> None:
        """Writes `bins.safetensors` (and `members.safetensors`) and then `bins.json` into a folder, path or URL.

        Raises:
            UserError: the folder cannot be written.
        """
        facts = {**self._facts(), "fingerprint": self.fingerprint}
        if self.pictures is not None and self.members is not None:
            content = save_tensors({"members": self.members, "pictures": self.pictures})
            with storage.publish(storage.join(folder, "members.safetensors")) as handle:
                handle.write(content)
            facts["members_sha256"] = hashlib.sha256(content).hexdigest()
        with storage.publish(storage.join(folder, "bins.safetensors")) as handle:
            handle.write(save_tensors(self._arrays()))
        storage.write_text(storage.join(folder, "bins.json"), json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str) -> Bins:
        """Reads what `save` wrote.

        Raises:
            UserError: nothing there, or files that do not belong together or were changed.
        """
        described = storage.read_bytes(storage.join(folder, "bins.json"))
        tensors = storage.read_bytes(storage.join(folder, "bins.safetensors"))
        pictured = storage.join(folder, "members.safetensors")
        try:
            facts, arrays = json.loads(described), load_tensors(tensors)
            content = storage.read_bytes(pictured) if storage.exists(pictured) else None
            kept = {} if content is None else load_tensors(content)
            bins = cls(
                centres=arrays.get("centres"),
                dimensions=arrays["dimensions"],
                std=arrays.get("std"),
                counts=arrays["counts"],
                shape=tuple(facts["shape"]),
                value_range=(facts["value_range"][0], facts["value_range"][1]),
                root_mean_square=facts["root_mean_square"],
                settings=BinSettings(**facts["settings"]),
                clustered=facts["clustered"],
                reference_name=facts["reference_name"],
                reference_fingerprint=facts["reference_fingerprint"],
                space=Space(**facts["space"]),
                members=kept.get("members"),
                pictures=kept.get("pictures"),
                labelled_by=Space(**facts["labelled_by"]) if "labelled_by" in facts else None,
            )
            intact = bins.fingerprint == facts["fingerprint"]
            if "members_sha256" in facts:  # older bins do not tell
                intact &= hashlib.sha256(content or b"").hexdigest() == facts["members_sha256"]
        except (
            *(KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError),
            SafetensorError,
        ) as error:
            raise UserError(f"cannot read the bins in {folder}: {error!r}; fit them again") from error
        if not intact:
            raise UserError(f"the bins in {folder} were changed or written in part: fit them again")
        return bins

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"centres": self.centres, "dimensions": self.dimensions, "counts": self.counts, "std": self.std}
        return {name: array for name, array in arrays.items() if array is not None}

    def _facts(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "value_range": list(self.value_range),
            "root_mean_square": self.root_mean_square,
            "settings": self.settings.model_dump(),
            "clustered": self.clustered,
            "reference_name": self.reference_name,
            "reference_fingerprint": self.reference_fingerprint,
            "space": asdict(self.space),
            **({} if self.labelled_by is None else {"labelled_by": asdict(self.labelled_by)}),
        }


@dataclass(frozen=True)
class Fitted:
    """Bins of one reference, and what else the first pass over it found."""

    bins: list[Bins]
    seen: Mapping[str, Any]


def fit_bins(
    over: Pass,
    settings: Sequence[BinSettings],
    *,
    name: str,
    fingerprint: str | None = None,
    n: int | None = None,
    space: Space | None = None,
    also: Mapping[str, Any] | None = None,
) -> Fitted:
    """Fits bins to a reference set that is only ever passed over: three passes, whatever the number of settings.

    K-means over a random subset of samples and dimensions, best of `n_init` starts; every sample then goes to its
    nearest centroid, and each centre becomes the mean of all its samples in the full dimension. One more
    assignment, to these final centres, gives the counts, so that reference and samples are counted by one rule.

    With `whiten`, features are divided by their standard deviation over the reference. A feature that is constant
    in the reference (up to float32 rounding) is divided by 1: it adds the same to every distance, and so decides
    nothing.

    Args:
        over: one pass over the reference.
        settings: of each set of bins; the subset and the whitening are those of the first.
        name, fingerprint: of the reference; without a fingerprint one is made of the values.
        n: samples in it, where it is known.
        space: what its features are.
        also: further observers of the first pass.

    Raises:
        UserError: fewer samples than bins, values that are not finite, or fewer clustered samples than bins.
    """
    first = settings[0]
    look, facts = _look(over, name, fingerprint, space, {
        "spread": Spread(), "sketch": Sketch(first.max_samples, n, first.seed), **(also or {})
    })  # fmt: skip
    spread, points = look["spread"], look["sketch"].features()
    if not (spread.squares > 0).any():
        raise UserError(f"{name}: all samples are alike there: take another reference, or other --features")
    std = spread.std() if first.whiten else None
    starts = []
    for each in settings:
        if len(points) < each.n_bins:
            raise UserError(f"{name}: {len(points)} samples for {each.n_bins} bins: use more samples or fewer bins")
        clusters = kmeans.fit(
            points if std is None else points / std,
            each.n_bins,
            n_init=each.n_init,
            max_dimensions=each.max_dimensions,
            seed=each.seed,
        )
        # K-means knows the used dimensions alone; a centroid without samples keeps the overall mean in the others.
        start = np.tile(spread.mean.astype(np.float32), (each.n_bins, 1))
        dimensions = np.asarray(clusters.dimensions, np.int64)
        start[:, dimensions] = clusters.centroids if std is None else clusters.centroids * std[dimensions]
        starts.append((start, dimensions))
    sums = over({str(i): CentreSums(start, dimensions, std) for i, (start, dimensions) in enumerate(starts)})
    drafts = [
        Bins(
            centres=sums[str(i)].means(),
            dimensions=dimensions,
            std=std,
            counts=np.zeros(each.n_bins, np.int64),
            settings=each,
            clustered=len(points),
            **facts,
        )
        for i, (each, (_, dimensions)) in enumerate(zip(settings, starts))
    ]
    return Fitted(_counted(over, drafts), look)


def label_bins(
    over: Pass,
    settings: BinSettings,
    *,
    name: str,
    fingerprint: str | None = None,
    space: Space | None = None,
    also: Mapping[str, Any] | None = None,
) -> Fitted:
    """Bins that are the reference's classes: given labels, or what a classifier says. Arguments as in `fit_bins`.

    Raises:
        UserError: the reference has no labels, is labelled in part, or has fewer than two classes.
    """
    look, facts = _look(over, name, fingerprint, space, {"classes": Classes(), **(also or {})})
    n_classes = look["classes"].n
    if n_classes < 2:
        raise UserError(f"{name}: no labels of two classes or more: name a --classifier, or take --bins NUMBER")
    draft = Bins(
        centres=None,
        dimensions=np.zeros(0, np.int64),
        std=None,
        counts=np.zeros(n_classes, np.int64),
        settings=settings.model_copy(update={"n_bins": n_classes}),
        clustered=0,
        labelled_by=look["classes"].labelled_by,
        **facts,
    )
    return Fitted(_counted(over, [draft]), look)


class Classes:
    """How many classes there are: those of the classifier, or one more than the largest label."""

    def __init__(self) -> None:
        self.n = 0
        self.labelled_by: Space | None = None

    def observe(self, seen: Observed) -> None:
        if seen.probabilities is not None:
            self.n, self.labelled_by = seen.probabilities.shape[1], seen.labelled_by
        elif seen.labels is not None:
            largest = int(seen.labels.max())
            if largest >= MAX_CLASSES:
                raise UserError(f"label {largest}: classes are numbered from 0, below {MAX_CLASSES:,}")
            self.n, self.labelled_by = max(self.n, largest + 1), seen.labelled_by

    def merge(self, other: Self) -> None:
        self.n, self.labelled_by = max(self.n, other.n), self.labelled_by or other.labelled_by


def _look(
    over: Pass, name: str, fingerprint: str | None, space: Space | None, observers: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The first pass, and the facts that all bins share."""
    digest = {} if fingerprint else {"digest": Digest()}
    look = over({"extent": Extent(), **digest, **observers})
    extent = look["extent"]
    return look, {
        "shape": extent.shape or (),
        "value_range": (extent.low, extent.high),
        "root_mean_square": extent.root_mean_square,
        "reference_name": name,
        "reference_fingerprint": fingerprint or look["digest"].hexdigest(),
        "space": space or Space(),
    }


def _counted(over: Pass, drafts: Sequence[Bins]) -> list[Bins]:
    """The same bins with the reference's counts and members, largest first (labels keep their order)."""
    seen = over({str(i): BinCounts(bins) for i, bins in enumerate(drafts)})
    done = []
    for i, bins in enumerate(drafts):
        counts, members = seen[str(i)].counts, seen[str(i)].members()
        order = np.arange(len(counts)) if bins.centres is None else np.argsort(-counts, kind="stable")
        centres = None if bins.centres is None else bins.centres[order]
        done.append(replace(bins, centres=centres, counts=counts[order], members=members[order]))
    return done


def pictured(shape: tuple[int, ...], n_bins: int) -> int:
    """Members of each bin whose pictures are worth keeping with the bins: none where samples are no images."""
    if not is_image(shape):
        return 0
    return min(MEMBERS, max(1, PICTURED // n_bins), _PICTURED_BYTES // max(1, n_bins * math.prod(shape) * 4))


class CentreSums:
    """Sums of the features of the samples nearest to each starting centre, in float64."""

    def __init__(self, start: np.ndarray, dimensions: np.ndarray, std: np.ndarray | None) -> None:
        self.start: np.ndarray | None = start
        self.dimensions, self.std = dimensions, std
        self.counts = np.zeros(len(start), np.int64)
        # Only of the centres that were hit: a partition holds far fewer values than K centres may have.
        self.rows = np.zeros(0, np.int64)
        self.sums = np.zeros((0, start.shape[1]))

    def observe(self, seen: Observed) -> None:
        # One sparse product per block: summed in float32 within a block and in float64 between blocks.
        start = self._known()
        for rows in _blocks(seen.features):
            members, _ = _assign(seen.features[rows], start, self.dimensions, self.std)
            hit, places = np.unique(members, return_inverse=True)
            entries = (np.ones(len(members), np.float32), (places, np.arange(len(members))))
            self._add(hit, sparse.csr_array(entries, shape=(len(hit), len(members))) @ seen.features[rows])
            self.counts += np.bincount(members, minlength=len(self.counts))

    def merge(self, other: Self) -> None:
        self._add(other.rows, other.sums)
        self.counts += other.counts

    def found(self) -> CentreSums:
        """Without the starting centres."""
        light = copy.copy(self)
        light.start = None
        return light

    def means(self) -> np.ndarray:
        """`[K, d]` float32; the start where a centre has no samples."""
        means = self._known().astype(np.float32)
        means[self.rows] = self.sums / self.counts[self.rows, None]
        return means

    def _known(self) -> np.ndarray:
        if self.start is None:
            raise ValueError("the starting centres are not at hand")
        return self.start

    def _add(self, rows: np.ndarray, sums: np.ndarray) -> None:
        every = np.union1d(self.rows, rows)
        if len(every) > len(self.rows):
            grown = np.zeros((len(every), sums.shape[1]))
            grown[np.searchsorted(every, self.rows)] = self.sums
            self.rows, self.sums = every, grown
        self.sums[np.searchsorted(every, rows)] += sums

    def __deepcopy__(self, memo: Any) -> CentreSums:
        """Shares the starting centres, which nobody writes to."""
        other = copy.copy(self)
        other.counts, other.rows, other.sums = self.counts.copy(), self.rows.copy(), self.sums.copy()
        return other


class BinCounts:
    """Samples per bin, and a few of each: those with the smallest random numbers."""

    def __init__(self, bins: Bins) -> None:
        self.bins: Bins | None = bins.without_pictures()
        n_bins = len(bins.counts)
        self.counts = np.zeros(n_bins, np.int64)
        self._limit = np.full(n_bins, np.iinfo(np.uint64).max, np.uint64)
        self._kept = (np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int64))

    def observe(self, seen: Observed) -> None:
        labels, _ = self._known().assign(seen)
        self.counts += np.bincount(labels, minlength=len(self.counts))
        rows = seen.ids < self._limit[labels]
        if rows.any():
            self._keep(labels[rows], seen.ids[rows], seen.positions[rows])

    def merge(self, other: Self) -> None:
        self.counts += other.counts
        self._keep(*other._kept)

    def found(self) -> BinCounts:
        """Without the bins."""
        light = copy.copy(self)
        light.bins = None
        return light

    def _known(self) -> Bins:
        if self.bins is None:
            raise ValueError("the bins are not at hand")
        return self.bins

    def __deepcopy__(self, memo: Any) -> BinCounts:
        """Shares the bins, which nobody writes to."""
        other = copy.copy(self)
        other.counts, other._limit = self.counts.copy(), self._limit.copy()
        return other

    def members(self) -> np.ndarray:
        """Positions `[K, MEMBERS]` int64 of some members of every bin, -1 where there are fewer."""
        found = np.full((len(self.counts), MEMBERS), -1, np.int64)
        labels, _, positions = self._kept
        first = np.searchsorted(labels, labels)
        found[labels, np.arange(len(labels)) - first] = positions
        return found

    def _keep(self, *more: np.ndarray) -> None:
        labels, ids, positions = (np.concatenate(pair) for pair in zip(self._kept, more))
        order = np.lexsort((positions, ids, labels))
        labels, ids, positions = labels[order], ids[order], positions[order]
        rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
        kept = rank < MEMBERS
        self._kept = (labels[kept], ids[kept], positions[kept])
        full = rank == MEMBERS - 1
        self._limit[labels[full]] = ids[full]

    def arrays(self) -> dict[str, np.ndarray]:
        labels, ids, positions = self._kept
        return {"labels": labels, "ids": ids, "positions": positions, "counts": self.counts}

    def identity(self) -> str:
        """What else it depends on."""
        return f"counts {self._known().fingerprint}"

    def restored(self, arrays: Mapping[str, np.ndarray], number: int) -> BinCounts:
        """Of that state, of the partition that is number `number` now."""
        found = BinCounts(self._known())
        found.counts = arrays["counts"].copy()
        found._keep(arrays["labels"], arrays["ids"], moved(arrays["positions"], number))
        return found


def _labels(seen: Observed, n_bins: int, labelled_by: Space | None) -> np.ndarray:
    own = seen.labelled_by
    if labelled_by and own and own.fingerprint != labelled_by.fingerprint:
        raise UserError(
            f"the bins are classes labelled by {labelled_by.name} ({labelled_by.fingerprint[:12]}), the samples by "
            f"{own.name} ({own.fingerprint[:12]}): take the labels that the bins were made of"
        )
    if seen.probabilities is not None:
        labels = seen.probabilities.argmax(axis=1)
    elif seen.labels is not None:
        labels = seen.labels
    else:
        raise UserError("the bins are classes, but the samples have no labels: name a --classifier that tells them")
    missing = int(np.count_nonzero(labels < 0))
    if missing:
        raise UserError(f"{missing:,} of {len(labels):,} samples have no label: label all, or take --bins NUMBER")
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_bins:
        raise UserError(f"labels from {labels.min()} to {labels.max()} for {n_bins} classes: number them from 0")
    return labels.astype(np.int64)


def _assign(
    flat: np.ndarray, centres: np.ndarray, dimensions: np.ndarray, std: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre `[n]` of every row in the used dimensions divided by `std`, and its squared distance."""
    every = len(dimensions) == flat.shape[1]

    def prepared(rows: np.ndarray) -> np.ndarray:
        part = rows if every else rows[:, dimensions]
        return np.ascontiguousarray(part if std is None else part / (std if every else std[dimensions]))

    targets = prepared(centres)
    found = [kmeans.assign(prepared(flat[rows]), targets) for rows in _blocks(flat)]
    return np.concatenate([labels for labels, _ in found]), np.concatenate([distances for _, distances in found])


def _blocks(flat: np.ndarray) -> Iterator[slice]:
    """Slices of rows, each of about `_BLOCK_BYTES`."""
    rows = max(1, _BLOCK_BYTES // max(1, flat[:1].nbytes))
    return (slice(start, start + rows) for start in range(0, len(flat), rows))


def _spelled(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape) or "single numbers"
