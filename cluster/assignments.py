"""Which of a model's components samples are of, and how far these are the classes that the samples have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cluster.models import LocalModel
from cluster.questions import samples_for, write_table
from data import storage
from data.errors import UserError
from eval.metrics.clustering import Agreement, agreement, contingency


@dataclass(frozen=True)
class Assignments:
    """Of n samples to K components.

    Attributes:
        responsibilities: p(k | x), [n, K] float32.
        label: classes [n], or None.
        agreement: of the most responsible components and the classes, or None.
    """

    responsibilities: np.ndarray
    label: np.ndarray | None
    agreement: Agreement | None

    @property
    def component(self) -> np.ndarray:
        """The most responsible component of each sample, [n]."""
        return self.responsibilities.argmax(1)

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each component, [K]."""
        return np.bincount(self.component, minlength=self.responsibilities.shape[1])


def assign(model: LocalModel, place: str, *, split: str = "test", seed: int = 0) -> Assignments:
    """The responsibilities of a model's components for all samples at a place.

    Raises:
        UserError: nothing usable there, samples of another shape, a model without responsibilities, or ones that are
            not finite.
    """
    model.require("responsibilities")
    found: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for block in samples_for(model, place, split=split, seed=seed):
        with torch.inference_mode():
            parts = torch.from_numpy(np.ascontiguousarray(block.x, np.float32)).flatten(1).split(model.batch)
            found += [model.model.responsibilities(part).float().numpy() for part in parts]
        if block.label is not None:
            labels.append(block.label)
    responsibilities = np.concatenate(found)
    if not np.isfinite(responsibilities).all():
        raise UserError(f"{place}: responsibilities of the model are not finite: train it again")
    label = np.concatenate(labels) if labels else None
    if label is None or len(label) != len(responsibilities) or label.min() < 0:
        return Assignments(responsibilities, None, None)
    # Numbered anew: labels may be identifiers of any size.
    classes, numbers = np.unique(label, return_inverse=True)
    table = contingency(responsibilities.argmax(1), numbers, responsibilities.shape[1], len(classes))
    return Assignments(responsibilities, label, agreement(table))


def write(path: str, found: Assignments) -> None:
    """A line of CSV for each sample: index, component, its responsibility, label; or .npy of all responsibilities."""
    if path.endswith(".npy"):
        with storage.publish(path) as handle:
            np.save(handle, found.responsibilities, allow_pickle=False)
        return
    component, largest = found.component, found.responsibilities.max(1)
    label = [None] * len(component) if found.label is None else found.label.tolist()
    rows = ((i, k, f"{p:.6g}", y) for i, (k, p, y) in enumerate(zip(component.tolist(), largest, label, strict=True)))
    write_table(path, ("index", "component", "responsibility", "label"), rows)
