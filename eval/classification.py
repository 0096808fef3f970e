"""How well class probabilities fit labels: accuracy, cross-entropy, and which classes are taken for which."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import UserError


@dataclass(frozen=True)
class Classification:
    """Scores over `n` labelled samples.

    Attributes:
        accuracy: share of samples whose most probable class is their label; its standard error is sqrt(a (1 - a) / n).
        cross_entropy: mean of -log p(label | x), in nats, with the standard error of the mean.
        confusion: [C, C] int64, samples by label (row) and most probable class (column).
        log_loss: -log p(label | x) of every sample, [n] float64, nats.
        predicted: most probable class, [n] int64; the lowest of several.
    """

    accuracy: float
    cross_entropy: float
    cross_entropy_error: float
    confusion: np.ndarray
    log_loss: np.ndarray
    predicted: np.ndarray

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.predicted)

    @property
    def accuracy_error(self) -> float:
        """Standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: all but the samples' own values."""
        return {
            "accuracy": self.accuracy,
            "accuracy_se": self.accuracy_error,
            "cross_entropy": self.cross_entropy,
            "cross_entropy_se": self.cross_entropy_error,
            "n_samples": self.n,
            "confusion": self.confusion.tolist(),
        }


def classification(log_probabilities: np.ndarray, labels: np.ndarray) -> Classification:
    """Scores of log p(class | x) [n, C], in nats, against labels [n] in 0 to C - 1.

    Raises:
        UserError: fewer than two samples, or values that are NaN.
        ValueError: labels that are no classes, or as many as there are not samples.
    """
    values, truth = np.asarray(log_probabilities, np.float64), np.asarray(labels, np.int64)
    n, n_classes = values.shape
    if truth.shape != (n,) or (n and not 0 <= truth.min() <= truth.max() < n_classes):
        raise ValueError(f"{n} rows of {n_classes} classes need {n} labels from 0 to {n_classes - 1}")
    if n < 2:
        raise UserError(f"a standard error needs at least 2 labelled samples, got {n}: use more")
    if np.isnan(values).any():
        raise UserError("the classifier answers with NaN: check data and training")
    loss, predicted = -values[np.arange(n), truth], values.argmax(1)
    confusion = np.bincount(truth * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    return Classification(
        float(np.mean(predicted == truth)),
        float(loss.mean()),
        float(loss.std(ddof=1) / math.sqrt(n)),
        confusion,
        loss,
        predicted,
    )
