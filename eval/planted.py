"""Planted collapse: sample sets in which one class is thinned, and every score of all of them against one reference.

What the sets of a split share is computed once: bins and the bin of every sample, moments and projections, distances
and kernels of all pairs. Each set is then a mask. The scores are those of `eval.metrics`, up to rounding; KID is over
one subset, the whole subsample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import UserError
from data.limits import MAX_SEED
from eval.arrays import bins_of, labels_of
from eval.bins import BinSettings
from eval.metrics import ndb
from eval.metrics.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS
from eval.metrics.moments import MAX_FEATURES, Moments

_PROJECTIONS = 500
# So many nearest neighbours of every sample are sorted; the rare sets that leave too few of them are searched whole.
_SORTED_NEIGHBOURS = 64
_SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Measure:
    """A score as a detector: its name in tables, and which way is worse (+1: larger).

    `calibrated` is False where the score is itself a test with a level, and alarms above 0.
    """

    label: str
    worse: int = 1
    calibrated: bool = True


MEASURES: Mapping[str, Measure] = {
    "ndb": Measure("NDB"),
    "ndb_holm": Measure("NDB, Holm", calibrated=False),
    "ndb_bh": Measure("NDB, BH", calibrated=False),
    "js": Measure("JS"),
    "fid": Measure("FID"),
    "kid": Measure("KID"),
    "precision": Measure("precision", -1),
    "recall": Measure("recall", -1),
    "density": Measure("density", -1),
    "coverage": Measure("coverage", -1),
    "sliced": Measure("sliced Wasserstein"),
}
_BINNED = {"ndb", "ndb_holm", "ndb_bh", "js"}
_MANIFOLD = {"precision", "recall", "density", "coverage"}


@dataclass(frozen=True)
class Measuring:
    """Which scores are taken, and how: `level` is that of NDB in each bin and of its corrections."""

    names: tuple[str, ...] = tuple(MEASURES)
    n_bins: int = 100
    n_init: int = 2
    subsample: int = 2000
    level: float = 0.05

    def __post_init__(self) -> None:
        unknown = set(self.names) - set(MEASURES)
        if unknown or not self.names:
            told = ", ".join(sorted(unknown)) or "none"
            raise UserError(f"unknown scores ({told}): choose from {', '.join(MEASURES)}")


def room(labels: np.ndarray, classes: Sequence[int], keep: Sequence[float]) -> int:
    """Samples that are left, at least, when any of the classes is thinned to any of the shares."""
    counts = np.array([np.count_nonzero(labels == label) for label in classes])
    left = [len(labels) - counts + _kept(counts, share) for share in keep]
    return int(np.min(left))


def plant(
    labels: np.ndarray, classes: Sequence[int], keep: Sequence[float], n: int, rng: np.random.Generator
) -> np.ndarray:
    """Sets of n samples each, as masks [1 + len(classes) * len(keep), len(labels)]: untouched, then thinned.

    Samples come in random order. A class of m samples is thinned to a random round(share m) of them, fewer being a
    subset of more; then the first n of what is left make the set, so that no class loses more by the trimming than
    another.
    """
    ranks = rng.permutation(len(labels))
    masks = np.ones((1 + len(classes) * len(keep), len(labels)), bool)
    row = 1
    for label in classes:
        own = np.flatnonzero(labels == label)
        own = own[np.argsort(ranks[own])]
        for share in keep:
            masks[row, own[int(_kept(np.array(len(own)), share)) :]] = False
            row += 1
    return _trimmed(masks, n)


def measure(
    reference: np.ndarray, samples: np.ndarray, masks: np.ndarray, how: Measuring, seed: int
) -> dict[str, np.ndarray]:
    """Every score of every set, `[sets]` each by its name, against one reference.

    Args:
        reference: features [n, d] in random order; pairwise scores take the first `how.subsample`.
        samples: features [m, d] in random order; of each set, pairwise scores take the first as many.
        masks: [sets, m], as `plant` gives them, all of one size.
        how: what is measured.
        seed: fixes the bins and the directions.

    Raises:
        UserError: fewer samples than bins or neighbours, or too many features for FID.
    """
    wanted, sizes = set(how.names), masks.sum(axis=1)
    size = min(how.subsample, len(reference), int(sizes.min()))
    if size < 2 * DENSITY_NEIGHBOURS:
        raise UserError(f"{size} samples are too few for scores of pairs: give a larger set, or larger classes")
    found: dict[str, np.ndarray] = {}
    if wanted & _BINNED:
        found |= _binned(reference, samples, masks, how, seed)
    if "fid" in wanted:
        found["fid"] = _frechet(reference, samples, masks)
    few = _trimmed(masks, size)
    few = few[:, : 1 + int(np.flatnonzero(few.any(axis=0))[-1])]
    a, b = reference[:size].astype(np.float64), samples[: few.shape[1]].astype(np.float64)
    if wanted & (_MANIFOLD | {"kid"}):
        aa, ab, bb = a @ a.T, a @ b.T, b @ b.T
        if "kid" in wanted:
            found["kid"] = _kernel(aa, ab, bb, few, a.shape[1])
        if wanted & _MANIFOLD:
            found |= _manifold(aa, ab, bb, few)
    if "sliced" in wanted:
        found["sliced"] = _sliced(a, b, few, seed)
    return {name: found[name] for name in how.names}


def _kept(counts: np.ndarray, share: float) -> np.ndarray:
    return np.rint(share * counts).astype(np.int64)


def _trimmed(masks: np.ndarray, n: int) -> np.ndarray:
    """The first n samples of every set."""
    return masks & (np.cumsum(masks, axis=1, dtype=np.int32) <= n)


def _binned(
    reference: np.ndarray, samples: np.ndarray, masks: np.ndarray, how: Measuring, seed: int
) -> dict[str, np.ndarray]:
    settings = BinSettings(n_bins=how.n_bins, n_init=how.n_init, seed=seed % (MAX_SEED + 1))
    bins = bins_of(reference, settings, fingerprint="a half of the set")
    labels = labels_of(bins, samples)
    results = [
        ndb.score(bins.counts, np.bincount(labels[mask], minlength=how.n_bins), significance=how.level)
        for mask in masks
    ]
    return {name: np.array([getattr(result, name) for result in results], np.float64) for name in sorted(_BINNED)}


def _frechet(reference: np.ndarray, samples: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """`frechet_distance`: with S_a = L Lᵀ, tr (S_a S_b)^½ is the sum of the roots of the eigenvalues of Lᵀ S_b L.

    Samples are multiplied by L once, and each set's scatter is the untouched set's but for the rows in which they
    differ.
    """
    if reference.shape[1] > MAX_FEATURES:
        raise UserError(f"FID takes up to {MAX_FEATURES} features, got {reference.shape[1]}: leave it out by --scores")
    moments = Moments(reference.shape[1])
    moments.update(reference)
    covariance = moments.covariance()
    variances, vectors = np.linalg.eigh(covariance)
    used = variances > _SMALLEST_VARIANCE * max(variances[-1], 0.0)
    root = vectors[:, used] * np.sqrt(variances[used])
    y = samples.astype(np.float64) - moments.mean
    z, weights, n = y @ root, masks.astype(np.float64), masks.sum(axis=1)
    means = weights @ y / n[:, None]
    spread = (weights @ np.square(y).sum(axis=1) - n * np.square(means).sum(axis=1)) / (n - 1)
    untouched = z[masks[0]]
    scatter = untouched.T @ untouched
    overlap = np.empty(len(masks))
    for row, mask in enumerate(masks):
        changed = np.flatnonzero(mask != masks[0])
        signs = np.where(mask[changed], 1.0, -1.0)
        mean = means[row] @ root
        own = scatter + (z[changed] * signs[:, None]).T @ z[changed] - n[row] * np.outer(mean, mean)
        overlap[row] = np.sqrt(np.maximum(np.linalg.eigvalsh(own / (n[row] - 1)), 0.0)).sum()
    distances: np.ndarray = np.square(means).sum(axis=1) + np.trace(covariance) + spread - 2 * overlap
    return np.maximum(distances, 0.0)


def _kernel(aa: np.ndarray, ab: np.ndarray, bb: np.ndarray, masks: np.ndarray, n_features: int) -> np.ndarray:
    """`kernel_distance` of one subset from the inner products of all pairs: unbiased MMD²."""
    within_a, between, within_b = (_cube(products / n_features + 1) for products in (aa, ab, bb))
    np.fill_diagonal(within_a, 0)
    np.fill_diagonal(within_b, 0)
    n, weights, m = len(aa), masks.astype(np.float64), masks.sum(axis=1)
    own = np.einsum("vm,vm->v", weights @ within_b, weights) / (m * (m - 1))
    found: np.ndarray = within_a.sum() / (n * (n - 1)) + own - 2 * (weights @ between.mean(axis=0)) / m
    return found


def _cube(x: np.ndarray) -> np.ndarray:
    return x * x * x


def _manifold(aa: np.ndarray, ab: np.ndarray, bb: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """`manifold_scores` from the inner products of all pairs."""
    k = NEIGHBOURS
    a, b = np.diag(aa), np.diag(bb)
    within_a, between, within_b = (
        np.maximum(left[:, None] + right - 2 * products, 0)
        for left, right, products in ((a, a, aa), (a, b, ab), (b, b, bb))
    )
    np.fill_diagonal(within_a, np.inf)
    np.fill_diagonal(within_b, np.inf)
    balls_a = np.partition(within_a, (k - 1, DENSITY_NEIGHBOURS - 1), axis=1)
    precise, inside = (between <= balls_a[:, n - 1 : n] for n in (k, DENSITY_NEIGHBOURS))
    weights, m = masks.astype(np.float64), masks.sum(axis=1)
    around = inside.sum(axis=0).astype(np.float64)
    near = np.argpartition(within_b, min(_SORTED_NEIGHBOURS, len(b) - 1), axis=1)[:, :_SORTED_NEIGHBOURS]
    distances = np.take_along_axis(within_b, near, axis=1)
    order = np.argsort(distances, axis=1)
    near, distances = np.take_along_axis(near, order, axis=1), np.take_along_axis(distances, order, axis=1)
    recalled = []
    for mask in masks:
        found = np.cumsum(mask[near], axis=1) == k
        balls = distances[np.arange(len(b)), found.argmax(axis=1)]
        rest = np.flatnonzero(mask & ~found.any(axis=1))
        balls[rest] = np.partition(np.where(mask, within_b[rest], np.inf), k - 1, axis=1)[:, k - 1]
        recalled.append((between <= np.where(mask, balls, -1.0)).any(axis=1).mean())
    return {
        "precision": weights @ precise.any(axis=0) / m,
        "recall": np.array(recalled),
        "density": weights @ around / m / DENSITY_NEIGHBOURS,
        "coverage": (inside.astype(np.float32) @ masks.T.astype(np.float32) > 0).mean(axis=0),
    }


def _sliced(a: np.ndarray, b: np.ndarray, masks: np.ndarray, seed: int) -> np.ndarray:
    """`sliced_wasserstein` of sets that are as large as the reference: the samples are sorted once a direction."""
    directions = np.random.default_rng(seed).standard_normal((_PROJECTIONS, a.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    known, projected = np.sort(directions @ a.T, axis=1), directions @ b.T
    order = np.argsort(projected, axis=1)
    ordered = np.take_along_axis(projected, order, axis=1)
    gaps = (ordered[mask[order]].reshape(_PROJECTIONS, -1) - known for mask in masks)
    return np.array([np.sqrt(np.einsum("pn,pn->", gap, gap) / gap.size) for gap in gaps])
