"""Fidelity, diversity and copying, by nearest neighbours: precision, recall, density, coverage, memorisation.

Sources: T. Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019,
section 2; M. Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, section 3;
C. Meehan, K. Chaudhuri and S. Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS
2020. Imports only NumPy, torch and SciPy; faults raise `ValueError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from eval.metrics import checks

# Of Kynkäänniemi et al. (precision, recall) and of Naeem et al. (density, coverage).
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
_BLOCK_ROWS, _BLOCK_COLUMNS = 1024, 4096
# Beyond so many features the bound on float32 products leaves too much to be settled one by one.
_FLOAT32_FEATURES = 16_384
# Neighbours beyond the k-th that are kept, to tell whether rounding could have changed which is the k-th.
_SPARE = 4
_EXACT_VALUES = 2**21


@dataclass(frozen=True)
class ManifoldScores:
    """Precision, recall, density and coverage with standard errors, each over the set it averages, the other held."""

    precision: float
    precision_standard_error: float
    recall: float
    recall_standard_error: float
    density: float
    density_standard_error: float
    coverage: float
    coverage_standard_error: float
    neighbours: int
    density_neighbours: int
    n_reference: int
    n_samples: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


@dataclass(frozen=True)
class Memorisation:
    """How near generated samples come to the training samples, compared with held-out ones.

    `shares` are the proportions of the generated samples that are within the `quantiles` of the held-out distances;
    without copying they are about `quantiles`, and exactly so for the held-out samples: `held_out_shares` (more where
    distances tie). `z` is the Mann-Whitney statistic, standard normal without copying, negative where generated
    samples are nearer. Distances `[n_samples]` and `[n_held_out]` are Euclidean; `nearest` `[n_samples]` is the
    training sample nearest to each generated one.
    """

    quantiles: tuple[float, ...]
    shares: tuple[float, ...]
    shares_standard_errors: tuple[float, ...]
    held_out_shares: tuple[float, ...]
    z: float
    distances: np.ndarray
    held_out_distances: np.ndarray
    nearest: np.ndarray

    def closest(self, n: int) -> np.ndarray:
        """Index pairs `[n, 2]` (generated, training): the `n` generated samples nearest to training, nearest first."""
        generated = np.argsort(self.distances, kind="stable")[:n]
        return np.stack([generated, self.nearest[generated]], axis=1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: everything but the single distances."""
        facts = asdict(self)
        for name in ("distances", "held_out_distances", "nearest"):
            facts.pop(name)
        return {
            **facts,
            "n_samples": len(self.distances),
            "n_held_out": len(self.held_out_distances),
            "median_distance": float(np.median(self.distances)),
            "median_held_out_distance": float(np.median(self.held_out_distances)),
        }


def manifold_scores(
    reference: np.ndarray,
    samples: np.ndarray,
    *,
    neighbours: int = NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
) -> ManifoldScores:
    """Precision, recall, density and coverage of `samples` `[m, d]` against `reference` `[n, d]`.

    Around every point lies a closed ball that reaches its k-th nearest neighbour in its own set (itself not counted).
    Precision is the share of samples inside any reference ball, recall the share of reference points inside any
    sample's ball, with k = `neighbours`; density is the mean number of reference balls around a sample, over k, and
    coverage the share of reference balls with any sample inside, with k = `density_neighbours`.

    Exact in float64 for the price of float32: what single precision cannot decide is computed again.

    Raises:
        ValueError: unusable features, or neighbours that are not fewer than the smaller set.
    """
    x, y = checks.pair(reference, samples, ("reference", "samples"))
    ks = neighbours, density_neighbours
    if not 1 <= min(ks) <= max(ks) < min(len(x), len(y)):
        raise ValueError(
            f"neighbours must be 1 to {min(len(x), len(y)) - 1}, one less than the smaller set, got {ks}: "
            "take more samples or fewer neighbours"
        )
    squares = nearest_neighbours(x, x, max(ks), same=True)[0]
    balls_x, density_balls = (squares[:, k - 1] for k in ks)
    balls_y = nearest_neighbours(y, y, neighbours, same=True)[0][:, -1]
    around, precise = np.zeros(len(y), np.int64), np.zeros(len(y), bool)
    covered, recalled = np.zeros(len(x), bool), np.zeros(len(x), bool)
    blocks = _Distances(x, y)
    for rows in _slices(len(x), _BLOCK_ROWS):
        for columns in _slices(len(y), _BLOCK_COLUMNS):
            distances, tolerance = blocks.squared(rows, columns)
            i, j = blocks.within(distances, tolerance, rows, columns, density_balls[rows, None])
            around[columns] += np.bincount(j, minlength=columns.stop - columns.start)
            covered[rows.start + i] = True
            precise[columns.start + blocks.within(distances, tolerance, rows, columns, balls_x[rows, None])[1]] = True
            recalled[rows.start + blocks.within(distances, tolerance, rows, columns, balls_y[None, columns])[0]] = True
    precision, recall, coverage = float(precise.mean()), float(recalled.mean()), float(covered.mean())
    return ManifoldScores(
        precision=precision,
        precision_standard_error=_proportion_error(precision, len(y)),
        recall=recall,
        recall_standard_error=_proportion_error(recall, len(x)),
        density=float(around.mean() / density_neighbours),
        density_standard_error=float(around.std(ddof=1) / density_neighbours / np.sqrt(len(y))),
        coverage=coverage,
        coverage_standard_error=_proportion_error(coverage, len(x)),
        neighbours=neighbours,
        density_neighbours=density_neighbours,
        n_reference=len(x),
        n_samples=len(y),
    )


def compare_distances(
    own: np.ndarray, other: np.ndarray, nearest: np.ndarray, quantiles: Sequence[float] = (0.01, 0.05)
) -> Memorisation:
    """Whether samples are nearer to training samples than held-out ones are, which nobody trained on.

    `own` `[m]` are the distances of samples to the nearest training sample, which `nearest` `[m]` names; `other` `[l]`
    are those of held-out ones. The z statistic is the C_T of Meehan et al. with one cell, by mid-ranks and with the
    variance's correction for ties; it is 0 where all distances are equal:

        U = #{sample farther than held-out} + ½ #{ties},   z = (U - m l / 2) / sd(U)

    A share s below the q-quantile of the held-out distances has the standard error of both sets' drawing,
    sqrt(s (1 - s) / m + q (1 - q) / l), as if both densities of distances were equal there.

    Raises:
        ValueError: a quantile that is not between 0 and 1.
    """
    if not all(0 < q < 1 for q in quantiles):
        raise ValueError(f"quantiles must lie between 0 and 1, got {quantiles}")
    limits = [np.quantile(other, q, method="inverted_cdf") for q in quantiles]
    shares = tuple(float(np.mean(own <= limit)) for limit in limits)
    errors = (_proportion_error(share, len(own)) ** 2 for share in shares)
    held = (_proportion_error(q, len(other)) ** 2 for q in quantiles)
    return Memorisation(
        quantiles=tuple(quantiles),
        shares=shares,
        shares_standard_errors=tuple(float(np.sqrt(a + b)) for a, b in zip(errors, held)),
        held_out_shares=tuple(float(np.mean(other <= limit)) for limit in limits),
        z=_mann_whitney_z(own, other),
        distances=own,
        held_out_distances=other,
        nearest=nearest,
    )


def nearest_neighbours(
    queries: np.ndarray, points: np.ndarray, k: int, *, same: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Squared Euclidean distances and indices, `[n, k]` each and nearest first, of the `k` nearest of `points`.

    With `same`, both are one set and no point is its own neighbour (a duplicate of it may be). Distances are those of
    the float64 differences; where float64 itself cannot tell which of two is nearer, either may come first.

    Raises:
        ValueError: unusable features, or fewer than `k` points.
    """
    queries, points = checks.features(queries, "queries", least=1), checks.features(points, "points", least=1)
    available = len(points) - same
    if queries.shape[1] != points.shape[1] or not 1 <= k <= available:
        raise ValueError(
            f"{k} neighbours of {queries.shape} among {points.shape} points: use the same features, and k up to "
            f"{available}"
        )
    blocks = _Distances(queries, points)
    squared, indices = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    kept = min(k + _SPARE, available)
    for rows in _slices(len(queries), _BLOCK_ROWS):
        pending = np.arange(rows.start, rows.stop)
        for dtype in (blocks.dtype, np.float64):
            squared[pending], indices[pending], unsure = _nearest(blocks, pending, k, kept, same, dtype)
            # Ties that float64 cannot tell apart either are left as they come.
            pending = pending[unsure] if kept < available and dtype != np.float64 else pending[:0]
            if not len(pending):
                break
    return squared, indices


def _nearest(
    blocks: _Distances, rows: np.ndarray, k: int, kept: int, same: bool, dtype: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances and indices of `rows`, `[n, k]`, and which rows `[n]` rounding leaves open."""
    values, found, tolerance = None, None, np.zeros(len(rows))
    for columns in _slices(blocks.n_columns, _BLOCK_COLUMNS):
        distances, error = blocks.squared(rows, columns, dtype)
        tolerance = np.maximum(tolerance, error)
        if same:
            own = np.flatnonzero((rows >= columns.start) & (rows < columns.stop))
            distances[own, rows[own] - columns.start] = np.inf
        best, where = torch.topk(distances, min(kept, distances.shape[1]), dim=1, largest=False)
        where += columns.start
        if values is not None and found is not None:
            best, order = torch.topk(torch.cat([values, best], 1), min(kept, values.shape[1] + best.shape[1]), 1, False)
            where = torch.gather(torch.cat([found, where], 1), 1, order)
        values, found = best, where
    assert values is not None
    assert found is not None
    rough, candidates = values.numpy().astype(np.float64), found.numpy()
    possible = rough <= rough[:, k - 1 : k] + 2 * tolerance[:, None]
    row, slot = np.nonzero(possible)
    exact = np.full(rough.shape, np.inf)
    exact[row, slot] = blocks.exact(rows[row], candidates[row, slot])
    nearest = np.lexsort((candidates, exact), axis=1)[:, :k]
    return np.take_along_axis(exact, nearest, 1), np.take_along_axis(candidates, nearest, 1), possible[:, -1]


class _Distances:
    """Squared distances between rows of `a` and of `b` by matrix products, with a bound on their rounding.

    Points are centred on b's mean and scaled into the unit ball first, so neither offset nor scale costs digits. With
    the norms as two more columns, [-2x, |x|², 1] · [y, 1, |y|²] is the squared distance itself. Its rounding, and
    that of the points to the precision of the product, is at most (d + 8) u (|x| + |y|)², u being half the spacing of
    numbers at 1, in whatever order the product is summed.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        self.a, self.b, self.n_columns = a, b, len(b)
        self.dtype: Any = np.float32 if b.shape[1] <= _FLOAT32_FEATURES else np.float64
        self.centre = b.mean(axis=0, dtype=np.float64)
        radius = max(self._radius(a), self._radius(b))
        self.scale = radius if radius > 0 else 1.0
        self.right = np.empty((len(b), b.shape[1] + 2), self.dtype)
        self.norms = np.empty(len(b))
        for rows in _slices(len(b), _BLOCK_ROWS):
            self.right[rows], self.norms[rows] = self._augmented(b[rows], self.dtype, left=False)

    def squared(self, rows: slice | np.ndarray, columns: slice, dtype: Any = None) -> tuple[torch.Tensor, np.ndarray]:
        """Scaled squared distances `[rows, columns]`, and how far each row's may be from exact, `[rows]`."""
        dtype = dtype or self.dtype
        left, norms = self._augmented(self.a[rows], dtype, left=True)
        right = self.right[columns] if dtype == self.dtype else self._augmented(self.b[columns], dtype, left=False)[0]
        reach = norms + self.norms[columns].max()
        unit = float(np.finfo(dtype).eps) / 2
        return torch.from_numpy(left @ right.T), (self.b.shape[1] + 8) * unit * reach * reach

    def within(
        self, distances: torch.Tensor, tolerance: np.ndarray, rows: slice, columns: slice, limits: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pairs, `[n]` rows and `[n]` columns of the block, whose exact squared distance is at most their limit.

        `limits` `[rows, 1]` or `[1, columns]` are not scaled. Few pairs are inside, so they are listed, not masked.
        """
        scaled = limits / self.scale**2
        # The limits are rounded too.
        margin = float(tolerance.max() + 4 * np.finfo(self.dtype).eps * scaled.max())
        inside = torch.nonzero(distances <= torch.from_numpy((scaled + margin).astype(self.dtype)), as_tuple=True)
        i, j = inside[0].numpy(), inside[1].numpy()
        limit = np.broadcast_to(limits, distances.shape)[i, j]
        unsure = np.flatnonzero(distances[inside].numpy() > limit / self.scale**2 - margin)
        kept = np.ones(len(i), bool)
        kept[unsure] = self.exact(i[unsure] + rows.start, j[unsure] + columns.start) <= limit[unsure]
        return i[kept], j[kept]

    def exact(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Squared distances `[n]` of single pairs by their float64 differences, not scaled."""
        result = np.empty(len(i))
        for part in _slices(len(i), max(1, _EXACT_VALUES // self.b.shape[1])):
            difference = self.a[i[part]].astype(np.float64)
            difference -= self.b[j[part]]
            result[part] = np.einsum("nd,nd->n", difference, difference)
        return result

    def _radius(self, x: np.ndarray) -> float:
        """The largest distance from the centre."""
        largest = 0.0
        for rows in _slices(len(x), _BLOCK_ROWS):
            block = x[rows] - self.centre
            largest = max(largest, float(np.einsum("nd,nd->n", block, block).max()))
        return float(np.sqrt(largest))

    def _augmented(self, x: np.ndarray, dtype: Any, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
        """One side of the product `[n, d + 2]`, and the scaled points' norms `[n]`."""
        block = (x - self.centre) / self.scale
        squares = np.einsum("nd,nd->n", block, block)
        side = np.empty((len(x), x.shape[1] + 2), dtype)
        side[:, :-2] = -2 * block if left else block
        side[:, -2], side[:, -1] = (squares, 1) if left else (1, squares)
        return side, np.sqrt(squares)


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _proportion_error(share: float, n: int) -> float:
    return float(np.sqrt(share * (1 - share) / n))


def _mann_whitney_z(x: np.ndarray, y: np.ndarray) -> float:
    """Positive where x tends to be larger."""
    m, n = len(x), len(y)
    ranks = stats.rankdata(np.concatenate([x, y]))
    u = ranks[:m].sum() - m * (m + 1) / 2
    ties = np.unique(ranks, return_counts=True)[1].astype(np.float64)
    total = m + n
    variance = m * n / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
    return float((u - m * n / 2) / np.sqrt(variance)) if variance > 0 else 0.0
