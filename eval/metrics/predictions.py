"""Scores of a classifier's predictions for generated samples: Inception score, MODE score, classes reached.

Sources: T. Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016, section 4; T. Che et al., "Mode
Regularized Generative Adversarial Networks", ICLR 2017, section 4; W. Gong, "Wasserstein Generative Adversarial
Network", 2017, equations 6.1 and 6.2. Imports only NumPy and SciPy; faults raise `ValueError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from scipy.special import rel_entr, xlogy

from eval.metrics import checks
from eval.metrics.hashing import splitmix64

# How far probabilities in half precision may miss their range and their sum.
_TOLERANCE = 2e-3
LEAST_IN_SPLIT = 50


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation (divisor: the number of splits) over the splits."""

    mean: float
    standard_deviation: float
    splits: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


class Predictions:
    """Sums over class probabilities p(y|x) of samples, kept apart by split.

    A sample's split is a hash of its number, so that it does not depend on order, blocks or workers. State: samples
    `[splits]`, summed probabilities `[splits, n_classes]`, summed entropies `[splits]` and arg-max counts
    `[n_classes]`.
    """

    def __init__(self, n_classes: int, splits: int = 10) -> None:
        if n_classes < 2:
            raise ValueError(f"at least 2 classes are needed, got {n_classes}")
        if splits < 1:
            raise ValueError(f"at least one split is needed, got {splits}")
        self.counts = np.zeros(splits, np.int64)
        self.sums = np.zeros((splits, n_classes))
        self.entropies = np.zeros(splits)
        self.predicted = np.zeros(n_classes, np.int64)

    def update(self, probabilities: np.ndarray, ids: np.ndarray) -> None:
        """Takes in class probabilities `[n, n_classes]` of the samples numbered `ids` `[n]` (whole, not negative).

        Raises:
            ValueError: another number of classes, rows that are not probabilities, or unusable numbers.
        """
        p = checks.features(probabilities, "probabilities", least=0).astype(np.float64)
        splits, n_classes = self.sums.shape
        if p.shape[1] != n_classes:
            raise ValueError(f"probabilities: {n_classes} classes are expected, got {p.shape[1]}")
        numbers = np.asarray(ids)
        if numbers.shape != (len(p),) or (numbers.size and numbers.dtype.kind not in "iu") or np.any(numbers < 0):
            raise ValueError(f"ids: one whole number per sample, not negative, got {numbers.dtype} {numbers.shape}")
        totals = p.sum(axis=1, keepdims=True)
        if np.any(p < -_TOLERANCE) or np.any(np.abs(totals - 1) > _TOLERANCE):
            raise ValueError("probabilities: rows must be at least 0 and add up to 1: apply a softmax to logits first")
        p = np.maximum(p, 0)
        p /= p.sum(axis=1, keepdims=True)
        split = (splitmix64(numbers.astype(np.uint64)) % np.uint64(splits)).astype(np.int64)
        # One row per split with a one for each of its samples: sums by one matrix product.
        members = (split == np.arange(splits)[:, None]).astype(np.float64)
        self.counts += np.bincount(split, minlength=splits)
        self.sums += members @ p
        # 0 log 0 = 0; the floor is below any float32, and far faster than asking each value.
        self.entropies -= members @ np.einsum("nc,nc->n", p, np.log(np.maximum(p, 1e-300)))
        self.predicted += np.bincount(p.argmax(axis=1), minlength=n_classes)

    def merge(self, other: Self) -> None:
        """Takes in what another one has seen.

        Raises:
            ValueError: other numbers of classes or splits.
        """
        if other.sums.shape != self.sums.shape:
            raise ValueError(f"predictions of [splits, classes] {self.sums.shape} and {other.sums.shape}: use one")
        self.counts += other.counts
        self.sums += other.sums
        self.entropies += other.entropies
        self.predicted += other.predicted

    def arrays(self) -> dict[str, np.ndarray]:
        """The state."""
        return {
            "counts": self.counts,
            "sums": self.sums,
            "entropies": self.entropies,
            "predicted": self.predicted,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The predictions of that state."""
        splits, n_classes = arrays["sums"].shape
        predictions = cls(n_classes, splits)
        predictions.counts = arrays["counts"].astype(np.int64)
        predictions.sums = arrays["sums"].astype(np.float64)
        predictions.entropies = arrays["entropies"].astype(np.float64)
        predictions.predicted = arrays["predicted"].astype(np.int64)
        return predictions

    @property
    def n(self) -> int:
        """Samples seen."""
        return int(self.counts.sum())

    def label_distribution(self) -> np.ndarray:
        """p(y) `[n_classes]`: the mean of p(y|x)."""
        return self.sums.sum(axis=0) / self._enough()

    def mean_entropy(self) -> float:
        """The mean entropy of p(y|x), in nats: low where the classifier is sure."""
        return float(self.entropies.sum() / self._enough())

    def classes_reached(self) -> int:
        """Classes that are the likeliest one of at least one sample."""
        return int(np.count_nonzero(self.predicted))

    def inception_score(self, least: int = LEAST_IN_SPLIT) -> InceptionScore:
        """exp(mean KL(p(y|x) || p(y))) of every split, with that split's own p(y): 1 to `n_classes`, higher is better.

        Splits are joined, to a divisor of their number, until each has `least` samples or one is left: the score of a
        few samples is far too low.

        Raises:
            ValueError: fewer than two samples.
        """
        self._enough()
        splits = len(self.counts)
        for joined in (k for k in range(splits, 0, -1) if splits % k == 0):
            counts, sums, entropies = (
                part.reshape(joined, splits // joined, -1).sum(1) for part in (self.counts, self.sums, self.entropies)
            )
            if counts.min() >= least:
                break
        p = sums / counts
        scores = np.exp(-xlogy(p, p).sum(axis=1) - (entropies / counts)[:, 0])
        return InceptionScore(float(scores.mean()), float(scores.std()), len(scores))

    def reference_divergence(self, reference: np.ndarray) -> float:
        """KL(p* || p), nats, from the reference's label distribution p* `[n_classes]` (counts do as well).

        Infinite where a class of the reference has no probability at all among the samples.

        Raises:
            ValueError: as `mode_score`.
        """
        return float(rel_entr(self._reference(reference), self.label_distribution()).sum())

    def mode_score(self, reference: np.ndarray) -> float:
        """exp(mean KL(p(y|x) || p*) - KL(p* || p)), equation 6.1 of the thesis: higher is better, 0 for a lost class.

        `reference` `[n_classes]` is p*, the label distribution of the data, or its counts. (With the second divergence
        the other way round, the score would not depend on p* at all: it would be the Inception score.)

        Raises:
            ValueError: fewer than two samples, or a reference of another length, negative, or without some class.
        """
        expected = self._reference(reference)
        cross = float(self.label_distribution() @ np.log(expected))
        return math.exp(-self.mean_entropy() - cross - self.reference_divergence(reference))

    def _enough(self) -> int:
        if self.n < 2:
            raise ValueError(f"scores of predictions need at least 2 samples, got {self.n}: take more")
        return self.n

    def _reference(self, reference: np.ndarray) -> np.ndarray:
        """p* as positive numbers that add up to 1."""
        p = np.asarray(reference, np.float64)
        if p.shape != self.predicted.shape:
            raise ValueError(f"reference: {len(self.predicted)} classes are expected, got shape {p.shape}")
        if not (np.all(np.isfinite(p)) and np.all(p > 0)):
            raise ValueError("reference: every class must have samples: leave absent classes out of the classifier")
        return p / p.sum()
