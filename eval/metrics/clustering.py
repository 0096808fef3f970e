"""How well clusters agree with known classes: accuracy under the best matching, purity, normalised information.

Sources: H. W. Kuhn, The Hungarian method for the assignment problem, 1955; A. Strehl, J. Ghosh, Cluster ensembles,
JMLR 2002. Imports only NumPy and SciPy; faults raise `ValueError`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import entr


@dataclass(frozen=True)
class Agreement:
    """Scores of a table of clusters and classes.

    Attributes:
        accuracy: share of samples of their cluster's class, where each cluster is matched with one class of its own so
            that this is largest; clusters beyond the classes, and their samples, stay unmatched.
        purity: share of samples of their cluster's largest class; several clusters may have the same.
        information: mutual information over the mean of both entropies, 0 to 1; 1 where both are constant.
        matching: class of each cluster `[n_clusters]`, -1 where it is unmatched.
        sizes: samples of each cluster `[n_clusters]`.
    """

    accuracy: float
    purity: float
    information: float
    matching: np.ndarray
    sizes: np.ndarray


def contingency(clusters: np.ndarray, classes: np.ndarray, n_clusters: int, n_classes: int) -> np.ndarray:
    """Samples `[n_clusters, n_classes]` of each cluster and class, from both of every sample, `[n]` whole numbers.

    Raises:
        ValueError: arrays of different lengths, or numbers outside the ranges.
    """
    a, b = np.asarray(clusters), np.asarray(classes)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"clusters and classes: one of each per sample is expected, got {a.shape} and {b.shape}")
    for name, values, count in (("clusters", a, n_clusters), ("classes", b, n_classes)):
        if values.dtype.kind not in "iu" or (values.size and not (values.min() >= 0 and values.max() < count)):
            raise ValueError(f"{name}: whole numbers from 0 to {count - 1} are expected")
    pairs = a.astype(np.int64) * n_classes + b.astype(np.int64)
    return np.bincount(pairs, minlength=n_clusters * n_classes).reshape(n_clusters, n_classes)


def agreement(table: np.ndarray) -> Agreement:
    """The scores of a table `[n_clusters, n_classes]` of samples.

    Raises:
        ValueError: no samples, or counts below zero.
    """
    counts = np.asarray(table, np.float64)
    if counts.ndim != 2 or not np.all(counts >= 0) or not counts.sum() > 0:
        raise ValueError("a table [n_clusters, n_classes] of at least one sample is expected")
    n = counts.sum()
    rows, columns = linear_sum_assignment(counts, maximize=True)
    matching = np.full(len(counts), -1)
    matching[rows] = columns
    joint = counts / n
    of_clusters, of_classes = (float(entr(joint.sum(axis)).sum()) for axis in (1, 0))
    shared = max(0.0, of_clusters + of_classes - float(entr(joint).sum()))
    mean = (of_clusters + of_classes) / 2
    return Agreement(
        accuracy=float(counts[rows, columns].sum() / n),
        purity=float(counts.max(axis=1).sum() / n),
        information=shared / mean if mean > 0 else 1.0,
        matching=matching,
        sizes=counts.sum(axis=1).astype(np.int64),
    )
