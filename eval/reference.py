"""A reference set as the yardstick of evaluations: fitted once, kept as an artefact, used without its samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from data import storage
from data.errors import UserError
from data.partitions import Partitions
from eval.bins import PICTURED, Bins, BinSettings, Space, fit_bins, label_bins, pictured
from eval.evaluate import narrow_range
from eval.observed import Pass
from eval.scores import ScoreSettings, Summary

REFERENCE = "reference.json"
_FORMAT = 2


@dataclass(frozen=True)
class Reference:
    """Bins (one set or several, all of one reference) and what the other scores need to know of it.

    `partitions` are the samples, where they are at hand: pictures and the search for copies need them. `facts` say
    how the set was read and fitted (JSON-safe): they belong to the protocol of every score by it.
    """

    bins: list[Bins]
    summary: Summary
    scale: str
    partitions: Partitions | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the reference set."""
        return self.bins[0].reference_name

    @property
    def space(self) -> Space:
        """Where distances are measured."""
        return self.bins[0].space

    def members(self, bins: Bins, rows: np.ndarray) -> list[np.ndarray]:
        """Some samples [m, *shape] of each of the bins `rows`: from the set itself, or what was kept of it."""
        if bins.members is None:
            return [np.zeros((0, 1))] * len(rows)
        if self.partitions is not None:
            return bin_members(self.partitions, bins.members, rows)
        kept = bins.pictures
        if kept is None:
            return [np.zeros((0, 1))] * len(rows)
        return [kept[k][bins.members[k] >= 0] for k in rows]

    def save(self, folder: str) -> None:
        """Writes a sub-folder per set of bins, `summary.safetensors` and, last, `reference.json`.

        Raises:
            UserError: the folder cannot be written.
        """
        names = []
        for number, bins in enumerate(self.bins):
            names.append(f"bins-{len(bins.counts)}" + (f"-{number}" if f"bins-{len(bins.counts)}" in names else ""))
            self._with_pictures(bins).save(storage.join(folder, names[-1]))
        summary = save_tensors({k: np.asarray(v, order="C") for k, v in self.summary.arrays().items()})
        with storage.publish(storage.join(folder, "summary.safetensors")) as handle:
            handle.write(summary)
        document = {
            "format": _FORMAT,
            "name": self.name,
            "scale": self.scale,
            "bins": {name: bins.fingerprint for name, bins in zip(names, self.bins)},
            "scores": asdict(self.summary.settings),
            "summary_sha256": hashlib.sha256(summary).hexdigest(),
            "facts": dict(self.facts),
        }
        storage.write_text(storage.join(folder, REFERENCE), json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str) -> Reference:
        """Reads what `save` wrote.

        Raises:
            UserError: nothing there, or files that do not belong together.
        """
        try:
            document = json.loads(storage.read_bytes(storage.join(folder, REFERENCE)))
            if document["format"] != _FORMAT:
                raise UserError(f"{folder}: a reference of format {document['format']!r}: fit it again")
            bins = [Bins.load(storage.join(folder, name)) for name in document["bins"]]
            if not bins or [each.fingerprint for each in bins] != list(document["bins"].values()):
                raise UserError(f"{folder}: these bins do not belong together: fit them again")
            settings = ScoreSettings(**{**document["scores"], "names": tuple(document["scores"]["names"])})
            summary = storage.read_bytes(storage.join(folder, "summary.safetensors"))
            known = document.get("summary_sha256")  # older references do not tell
            if known is not None and known != hashlib.sha256(summary).hexdigest():
                raise UserError(f"the summary in {folder} was changed or is damaged: fit the reference again")
            arrays = load_tensors(summary)
            facts = {str(name): value for name, value in document["facts"].items()}
            return cls(bins, Summary.from_arrays(settings, arrays), document["scale"], facts=facts)
        except (
            *(KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError),
            SafetensorError,
        ) as error:
            raise UserError(f"cannot read the reference in {folder}: {error!r}; fit it again") from error

    def _with_pictures(self, bins: Bins) -> Bins:
        m = pictured(bins.shape, len(bins.counts))
        if self.partitions is None or bins.members is None or not m:
            return bins
        chosen = bins.members[:, :m].copy()
        chosen[-(-PICTURED // m) :] = -1  # the bins are sorted: the largest keep theirs
        pictures = np.zeros((*chosen.shape, *bins.shape), np.float32)
        if (chosen >= 0).any():
            pictures[chosen >= 0] = self.partitions.fetch(chosen[chosen >= 0])
        return replace(bins, members=chosen, pictures=pictures)


def bin_members(samples: Partitions, members: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Some samples [m, *shape] of each of the bins `rows`, by their positions `members`; none where a bin is empty."""
    chosen = [members[k][members[k] >= 0] for k in rows]
    places = np.concatenate(chosen)
    found = samples.fetch(places) if len(places) else np.zeros((0, 1), np.float32)
    return np.split(found, np.cumsum([len(part) for part in chosen])[:-1])


def fit_reference(
    partitions: Partitions,
    over: Pass,
    settings: Sequence[BinSettings],
    scores: ScoreSettings,
    *,
    name: str | None = None,
    space: Space | None = None,
    labels: bool = False,
) -> Reference:
    """Fits all bins and gathers what the scores need, in three passes over the reference.

    Args:
        partitions: the reference.
        over: passes over it.
        settings: of each set of bins; with `labels` the classes are the (only) bins.
        scores: what else is going to be measured.
        name: of the reference; its own if None.
        space: what the pass takes for features.

    Raises:
        UserError: as `fit_bins` and `label_bins`.
    """
    named: dict[str, Any] = {
        "name": name or partitions.name, "fingerprint": partitions.fingerprint, "space": space
    }  # fmt: skip
    also = {"summary": Summary(scores, partitions.n, parts=2)}
    if labels:
        fitted = label_bins(over, settings[0], also=also, **named)
    else:
        fitted = fit_bins(over, settings, n=partitions.n, also=also, **named)
    read = {f"reference_{key}": value for key, value in {**partitions.facts, **scores.facts()}.items()}
    cut = settings[0]
    if not labels:
        read["kmeans_subset"] = (
            f"{cut.max_samples or 'all'} samples (those with the smallest SplitMix64 numbers, in 1 GiB at most) and "
            f"{cut.max_dimensions or 'all'} dimensions, seed {cut.seed}"
        )
    reached = narrow_range(fitted.bins[0].value_range[1], partitions.levels)
    if reached is not None:
        read["reference_reach"] = reached
    return Reference(fitted.bins, fitted.seen["summary"], partitions.scale, partitions, read)
