"""One pass over a set of samples: every observer sees every sample once, in this process.

Partitions are observed apart and merged in their order, so that a pass that is shared by workers gives the same result
to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import UserError
from data.partitions import Partitions, Piece, position
from data.pixels import scale
from eval.features import Extractor, Features
from eval.observed import GIVEN, Observed, Pass, Space, sample_ids

# Pieces are joined to blocks of about so many bytes: matrix products want many rows.
_BLOCK_BYTES = 32 << 20
_BLOCK_ROWS = 32_768


@dataclass(frozen=True)
class View:
    """What is looked at in every sample: features, and class probabilities.

    Without `features` distances are measured between the samples' own values. Without `classifier` the probabilities
    are those of the features' own extractor, where it has any, or those that are kept with the samples.
    """

    features: Extractor | None = None
    classifier: Extractor | None = None

    @property
    def space(self) -> Space:
        """Of the features."""
        return Space(self.features.name, self.features.fingerprint) if self.features else Space()

    def facts(self) -> dict[str, Any]:
        """For protocols, beside the space: what is done to images first, and which classifier tells classes."""
        found = {} if self.features is None else {"features_preprocessing": self.features.preprocessing}
        classifier = self.classes
        if classifier is None:
            return found
        return {
            **found,
            "classifier": f"{classifier.name}, {classifier.note}".rstrip(", "),
            "classifier_fingerprint": classifier.fingerprint,
            "classifier_preprocessing": classifier.preprocessing,
        }

    @property
    def classes(self) -> Extractor | None:
        """What gives class probabilities, where it has any."""
        return self.classifier or self.features

    def look(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Features [n, d] and class probabilities [n, n_classes] or None."""
        found = self.features(x) if self.features else Features(x.reshape(len(x), -1))
        probabilities = found.probabilities if self.classifier is None else self.classifier(x).probabilities
        return found.x, probabilities


def observe_partition(
    partitions: Partitions, number: int, view: View, observers: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Copies of the observers that have seen one partition, without what they were given (see `light`).

    Raises:
        UserError: damaged data, or samples that an observer refuses; it names the set.
    """
    found = {name: copy.deepcopy(observer) for name, observer in observers.items()}
    for start, x, labels, kept in blocks(partitions, number):
        try:
            seen = seen_by(view, partitions, number, start, x, labels, kept)
            for observer in found.values():
                observer.observe(seen)
        except UserError as error:
            raise UserError(f"{partitions.name}: {error}") from error
    return light(found)


def seen_by(
    view: View,
    partitions: Partitions,
    number: int,
    start: int,
    x: np.ndarray,
    labels: np.ndarray | None,
    kept: np.ndarray | None,
) -> Observed:
    """Samples start, start + 1, ... of a partition as the view sees them; `kept` are probabilities stored with them."""
    features, probabilities = view.look(x)
    by, known, told = view.classes, partitions.classifier, None
    if probabilities is not None and by is not None:
        told = (by.name, by.fingerprint, by.of_labels)
    elif kept is not None and known is not None:
        probabilities, told = kept, known
    return Observed(
        x=x,
        features=features,
        ids=sample_ids(partitions.seeds[number], len(x), start),
        positions=position(number, np.arange(start, start + len(x))),
        labels=labels,
        probabilities=probabilities,
        labelled_by=GIVEN if told is None else Space(*told[:2]),
        of_labels=told is not None and told[2],
    )


def light(observers: Mapping[str, Any]) -> dict[str, Any]:
    """What the observers found, without what they were given where that may be large (`found`): to be merged."""
    return {name: each.found() if hasattr(each, "found") else each for name, each in observers.items()}


# The first row's place, samples on the scale of the scores, labels or None, class probabilities or None.
_Block = tuple[int, np.ndarray, np.ndarray | None, np.ndarray | None]


def blocks(partitions: Partitions, number: int) -> Iterator[_Block]:
    """A partition in large blocks: first place, samples on the scale of the scores, labels, class probabilities."""
    waiting: list[Piece] = []
    held = 0
    for piece in partitions.pieces(number):
        waiting.append(piece)
        held += len(piece.x)
        if held >= min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * max(1, piece.x[0].size))):
            yield _joined(waiting, partitions.levels)
            waiting, held = [], 0
    if waiting:
        yield _joined(waiting, partitions.levels)


def _joined(pieces: list[Piece], levels: int | None) -> _Block:
    x = pieces[0].x if len(pieces) == 1 else np.concatenate([piece.x for piece in pieces])
    labels = None
    if any(piece.label is not None for piece in pieces):  # -1: none
        each = (np.full(len(piece.x), -1) if piece.label is None else piece.label for piece in pieces)
        labels = np.concatenate(list(each))
    kept = [piece.probabilities for piece in pieces if piece.probabilities is not None]
    return pieces[0].start, scale(x, levels), labels, np.concatenate(kept) if len(kept) == len(pieces) else None


Observe = Callable[[Partitions, int, View, Mapping[str, Any]], Mapping[str, Any]]


def local_pass(
    partitions: Partitions,
    view: View | None = None,
    progress: Callable[..., Any] = lambda *a, **b: None,
    observe: Observe | None = None,
) -> Pass:
    """Passes over a set in this process.

    Args:
        partitions: the set.
        view: what is looked at; the samples' own values if None.
        progress: told (samples done, total), or partitions where the samples' number is not known.
        observe: takes the place of `observe_partition`.
    """
    seen_by, look = view or View(), observe or observe_partition

    def over(observers: Mapping[str, Any]) -> Mapping[str, Any]:
        parts = (look(partitions, number, seen_by, observers) for number in range(len(partitions)))
        return merged(partitions, observers, parts, progress)

    return over


def merged(
    partitions: Partitions,
    observers: Mapping[str, Any],
    parts: Iterable[Mapping[str, Any]],
    progress: Callable[..., Any],
) -> Mapping[str, Any]:
    """Copies of the observers that have taken in what those of every partition have seen, in the set's order.

    Raises:
        UserError: there are no partitions.
    """
    total = copy.deepcopy(dict(observers))
    done = 0
    for number, part in enumerate(parts):
        for name, observer in part.items():
            total[name].merge(observer)
        done += 1 if partitions.sizes is None else partitions.sizes[number]
        progress(done, total=len(partitions) if partitions.n is None else partitions.n)
    if not len(partitions):
        raise UserError(f"{partitions.name}: no samples there: check the path and the split")
    return total
