"""K-means over samples: the only module that knows FAISS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from data.errors import UserError
from data.limits import MAX_MAGNITUDE

_CHUNK_BYTES = 64 << 20
_SCREENING_ITERATIONS = 15
# Squared ratio of offset to spread beyond which samples are centred.
_FAR = 100
# Squared distance above which values may lie beyond MAX_MAGNITUDE.
_FARTHEST = MAX_MAGNITUDE**2 / 4


@dataclass(frozen=True)
class KMeansResult:
    """Clusters of one fit.

    Attributes:
        centroids: [n_clusters, n_features_used] float32.
        dimensions: [n_features_used] int64, the features that were used: all, or a sorted random subset.
        objective: sum of squared distances from the fitted samples to their centroids.
    """

    centroids: np.ndarray
    dimensions: np.ndarray
    objective: float


def fit(
    x: np.ndarray,
    n_clusters: int,
    *,
    n_init: int = 10,
    n_iterations: int = 100,
    max_samples: int | None = None,
    max_dimensions: int | None = None,
    seed: int = 0,
    gpu: bool | None = None,
) -> KMeansResult:
    """Lloyd's algorithm from `n_init` random starts; the best of them after 15 iterations is carried to the end.

    Ten starts of 15 iterations and 100 of the best cost what ten starts of FAISS's usual 25 cost, and end at a
    partition that moves no more, so that two fits differ by their samples and not by where they were stopped.

    The result is a pure function of the arguments and the number of threads.

    Args:
        x: [n_samples, n_features], any real dtype; computed in float32.
        n_clusters: K.
        n_init: number of starts.
        n_iterations: Lloyd iterations of the best start (the screening takes at most as many of each).
        max_samples: fit on a random subset of so many samples; None means all of them.
        max_dimensions: measure distances in a random subset of so many features; None means all of them.
        seed: fixes the subsets and the starts.
        gpu: True demands FAISS's GPUs, False forbids them, None uses all there are.

    Raises:
        UserError: fewer samples than clusters, a count below one, values that are NaN, infinite or too large, or no
            GPU where one is demanded.
    """
    if x.ndim != 2:
        raise UserError(f"K-means needs samples as [n, features] but got the shape {x.shape}: flatten them first")
    limits = {"n_clusters": n_clusters, "n_init": n_init, "n_iterations": n_iterations,
              "max_samples": max_samples, "max_dimensions": max_dimensions}  # fmt: skip
    for name, value in limits.items():
        if value is not None and value < 1:
            raise UserError(f"K-means: {name} is {value}: choose 1 or more")
    rows = _subset(len(x), max_samples, [seed, 0])
    dimensions = _subset(x.shape[1], max_dimensions, [seed, 1])
    if len(rows) < n_clusters:
        raise UserError(
            f"K-means: {n_clusters} clusters need at least as many samples, but there are {len(rows)}: "
            "ask for fewer clusters or give more samples"
        )
    if len(rows) < len(x):
        x = x[rows]
    if len(dimensions) < x.shape[1]:
        x = x[:, dimensions]
    points = np.ascontiguousarray(x, dtype=np.float32)
    step = _chunk_rows(points.shape[1])
    for start in range(0, len(points), step):
        _check_values(points[start : start + step], rows[start : start + step])
    options = {
        "seed": seed & 0x7FFFFFFF,
        "gpu": _use_gpu(gpu),
        # Below the first bound FAISS prints a warning, above the second it silently drops samples.
        "min_points_per_centroid": 1,
        "max_points_per_centroid": -(-len(points) // n_clusters),
    }
    offset = _offset(points)
    if offset is not None:
        points = points - offset
    best: np.ndarray | None = None
    if n_init > 1:
        screening = min(_SCREENING_ITERATIONS, n_iterations)
        screened = faiss.Kmeans(points.shape[1], n_clusters, niter=screening, nredo=n_init, **options)
        screened.train(points)
        best = screened.centroids
    kmeans = faiss.Kmeans(points.shape[1], n_clusters, niter=n_iterations, nredo=1, **options)
    objective = float(kmeans.train(points, init_centroids=best))
    centroids = np.array(kmeans.centroids, dtype=np.float32)
    return KMeansResult(centroids if offset is None else centroids + offset, dimensions, objective)


def assign(x: np.ndarray, centroids: np.ndarray, gpu: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of every sample.

    Squared distances are good to 1e-4 of the centroids' own spread or of themselves, whatever the features' offset.

    Args:
        x: [n_samples, n_features_used], already restricted to the dimensions of the fit; converted in chunks.
        centroids: [n_clusters, n_features_used].
        gpu: as in `fit`.

    Returns:
        int64 labels [n_samples] and float32 squared distances [n_samples].

    Raises:
        UserError: NaN, infinite or too large samples, a different number of features, or no GPU where one is demanded.
    """
    if x.ndim != 2 or x.shape[1] != centroids.shape[1]:
        raise UserError(
            f"samples of shape {x.shape} do not fit centroids of {centroids.shape[1]} features: "
            "use samples of the data set that the bins were made of"
        )
    index: Any = faiss.IndexFlatL2(centroids.shape[1])
    if _use_gpu(gpu):
        index = faiss.index_cpu_to_all_gpus(index)
    targets = np.ascontiguousarray(centroids, dtype=np.float32)
    offset = _offset(targets)
    index.add(targets if offset is None else targets - offset)
    labels = np.empty(len(x), dtype=np.int64)
    distances = np.empty(len(x), dtype=np.float32)
    step = _chunk_rows(x.shape[1])
    for start in range(0, len(x), step):
        chunk = np.ascontiguousarray(x[start : start + step], dtype=np.float32)
        if offset is not None:
            chunk = chunk - offset
        found, nearest = index.search(chunk, 1)
        # What cannot be computed with has no neighbour, or none at a finite distance: looking at these is nearly free.
        if nearest.min(initial=0) < 0 or not np.isfinite(found).all() or found.max(initial=0) > _FARTHEST:
            _check_values(chunk, np.arange(start, start + len(chunk)))
        labels[start : start + step], distances[start : start + step] = nearest[:, 0], found[:, 0]
    return labels, distances


def _use_gpu(wanted: bool | None) -> bool:
    available = faiss.get_num_gpus() > 0
    if wanted and not available:
        raise UserError("K-means should use a GPU but FAISS sees none: install faiss-gpu or set gpu to false")
    return available if wanted is None else wanted


def _subset(n: int, limit: int | None, key: list[int]) -> np.ndarray:
    """Sorted indices [min(n, limit)] int64, drawn without replacement."""
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(key).choice(n, limit, replace=False))


def _offset(points: np.ndarray) -> np.ndarray | None:
    """What to subtract from points [n, d] and samples alike before FAISS expands |x - c|²; None where it can do so.

    Its rounding is some 1e-7 of |x|², so it matters where the mean is many times as far from 0 as points are from it.
    Subtracting costs a pass over the samples, which for a hundred centroids takes as long as the search.
    """
    mean = points.mean(axis=0, dtype=np.float64)
    squares = float(np.einsum("nd,nd->", points, points, dtype=np.float64)) / max(1, len(points))
    far = float(mean @ mean)
    return mean.astype(np.float32) if far > _FAR * max(squares - far, 0.0) else None


def _chunk_rows(n_features: int) -> int:
    return max(1, _CHUNK_BYTES // (4 * max(1, n_features)))


def _check_values(chunk: np.ndarray, rows: np.ndarray) -> None:
    extent = np.abs(chunk).max(axis=1, initial=0)
    usable = extent <= MAX_MAGNITUDE  # false for NaN
    if not usable.all():
        first = int(np.argmin(usable))
        if np.isfinite(extent[first]):  # FAISS would abort where distances overflow
            raise UserError(f"K-means: sample {rows[first]} holds values beyond {MAX_MAGNITUDE:g}: rescale the samples")
        raise UserError(f"K-means: sample {rows[first]} holds NaN or infinite values: remove it or repair its source")
