"""Optimal transport between two sets of features: the sliced Wasserstein distance and the Sinkhorn divergence.

Sources: N. Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", 2015; S. Kolouri et al.,
"Sliced-Wasserstein Autoencoder", 2018, equations 9 to 12; A. Genevay, G. Peyré and M. Cuturi, "Learning Generative
Models with Sinkhorn Divergences", AISTATS 2018; J. Feydy et al., "Interpolating between Optimal Transport and MMD using
Sinkhorn Divergences", AISTATS 2019. Imports only NumPy and torch; faults raise `ValueError`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from eval.metrics import checks

MAX_PAIRS = 4 * 10**8
# A block of the cost matrix and its exponentials stay in the cache over the passes of one iteration.
_BLOCK_VALUES = 2**19


@dataclass(frozen=True)
class SlicedWasserstein:
    """The distance (in the features' units), its standard error over projections, and how they were drawn."""

    value: float
    standard_error: float
    p: float
    projections: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


@dataclass(frozen=True)
class SinkhornDivergence:
    """The divergence, in squared units of the features, and how it was reached.

    `value` is debiased entropic transport (Feydy et al.): 0 for equal sets (up to rounding), else positive. `plan_cost`
    is the same difference for the mere costs <π, C> of the three plans (Genevay et al.), which may be negative.
    `regularisation` is the absolute ε, `mean_cost` what it was measured by; `iterations` and `violation` (L1, of the
    worst marginal) are the largest of the three problems, and `converged` tells whether every violation is within the
    tolerance.
    """

    value: float
    plan_cost: float
    regularisation: float
    mean_cost: float
    iterations: int
    violation: float
    converged: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


def sliced_wasserstein(
    a: np.ndarray, b: np.ndarray, *, p: float = 2.0, projections: int = 500, seed: int = 0
) -> SlicedWasserstein:
    """The sliced Wasserstein distance between features `[n, d]` and `[m, d]`, in float64.

        SW_p = (mean over directions θ of W_p^p(θᵀa, θᵀb))^(1/p),   W_p^p = ∫ |F_a⁻¹(t) - F_b⁻¹(t)|^p dt

    Directions are uniform on the sphere (normalised rows of `default_rng(seed).standard_normal((projections, d))`).
    The integral is exact for any n and m: the quantile functions are steps. The standard error is that of the mean of
    W_p^p over directions, carried through the root.

    Raises:
        ValueError: unusable features, p below 1, or fewer than two projections.
    """
    a, b = checks.pair(a, b, ("a", "b"))
    if not 1 <= p < np.inf:
        raise ValueError(f"p must be at least 1, got {p}")
    if projections < 2:
        raise ValueError(f"a standard error needs at least 2 projections, got {projections}")
    centre = b.mean(axis=0, dtype=np.float64)
    x, y = (a - centre).T, (b - centre).T
    weights, from_a, from_b = _common_steps(len(a), len(b))
    rng = np.random.default_rng(seed)
    costs = []
    block = max(1, _BLOCK_VALUES // max(len(a), len(b), len(x)))
    for start in range(0, projections, block):
        directions = rng.standard_normal((min(block, projections - start), len(x)))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        u, v = directions @ x, directions @ y
        u.sort(axis=1)
        v.sort(axis=1)
        gaps = np.abs(u - v) if len(a) == len(b) else np.abs(u[:, from_a] - v[:, from_b])
        costs.append((gaps * gaps if p == 2 else gaps**p) @ weights)
    cost = np.concatenate(costs)
    mean = float(cost.mean())
    value = mean ** (1 / p)
    error = float(cost.std(ddof=1) / np.sqrt(projections))
    return SlicedWasserstein(value, error * value / (p * mean) if mean > 0 else 0.0, p, projections, seed)


def sinkhorn_divergence(
    a: np.ndarray,
    b: np.ndarray,
    *,
    regularisation: float = 0.05,
    epsilon: float | None = None,
    tolerance: float = 2e-5,
    max_iterations: int = 1000,
    dtype: torch.dtype = torch.float32,
) -> SinkhornDivergence:
    """OT_ε(a, b) - OT_ε(a, a)/2 - OT_ε(b, b)/2 between features `[n, d]` and `[m, d]`, uniform weights.

        OT_ε(a, b) = min over plans π of <π, C> + ε KL(π || a ⊗ b),   C = |x - y|²

    ε is `epsilon`, in squared units of the features, or else `regularisation` times the mean of C over all pairs (x, y)
    of the two sets; divergences compare only at one ε. Finite samples raise the divergence. Potentials are updated in
    the log domain, f and g in turn between two sets, f ← (f + Tf)/2 within one, until the marginals of the plan are
    within `tolerance` (L1) of uniform, `max_iterations` at the most; the dual value then is off by the order of its
    square.
    The cost matrix is held once, in `dtype`; potentials are float64.

    Raises:
        ValueError: unusable features or settings, or more than 4e8 pairs.
    """
    a, b = checks.pair(a, b, ("a", "b"))
    positive = (regularisation, 1.0 if epsilon is None else epsilon, tolerance)
    if not (all(0 < value < np.inf for value in positive) and max_iterations >= 1):
        raise ValueError("regularisation, epsilon, tolerance and max_iterations must be positive")
    if max(len(a), len(b)) ** 2 > MAX_PAIRS:
        raise ValueError(f"{len(a)} and {len(b)} samples are too many: draw subsamples of at most {MAX_PAIRS**0.5:.0f}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    centre = b.mean(axis=0, dtype=np.float64)
    x, y = a - centre, b - centre
    mean_cost = float(np.square(x).sum(1).mean() + np.square(y).sum(1).mean() - 2 * x.mean(0) @ y.mean(0))
    if mean_cost <= 0:
        return SinkhornDivergence(0.0, 0.0, epsilon or 0.0, 0.0, 0, 0.0, True)
    epsilon = regularisation * mean_cost if epsilon is None else epsilon
    # In units of ε: single precision sees neither the features' scale nor their offset.
    x, y = x / np.sqrt(epsilon), y / np.sqrt(epsilon)
    between = _transport(_cost(x, y, dtype), tolerance, max_iterations, symmetric=False)
    within = [_transport(_cost(z, z, dtype), tolerance, max_iterations, symmetric=True) for z in (x, y)]
    problems = [between, *within]
    violation = max(problem.violation for problem in problems)
    return SinkhornDivergence(
        value=epsilon * (between.dual - (within[0].dual + within[1].dual) / 2),
        plan_cost=epsilon * (between.plan_cost - (within[0].plan_cost + within[1].plan_cost) / 2),
        regularisation=epsilon,
        mean_cost=mean_cost,
        iterations=max(problem.iterations for problem in problems),
        violation=violation,
        converged=violation <= tolerance,
    )


@dataclass(frozen=True)
class _Transport:
    """One entropic problem's dual value and the cost of its plan, in units of ε."""

    dual: float
    plan_cost: float
    iterations: int
    violation: float


def _cost(x: np.ndarray, y: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Squared distances `[n, m]`, by blocks of one float64 product each."""
    cost = torch.empty((len(x), len(y)), dtype=dtype)
    x_squares, y_squares = np.square(x).sum(1), np.square(y).sum(1)
    rows = max(1, 8 * _BLOCK_VALUES // len(y))
    for start in range(0, len(x), rows):
        block = (-2 * x[start : start + rows]) @ y.T
        block += x_squares[start : start + rows, None]
        block += y_squares
        cost[start : start + rows] = torch.from_numpy(np.maximum(block, 0, out=block))
    return cost


def _transport(cost: torch.Tensor, tolerance: float, max_iterations: int, *, symmetric: bool) -> _Transport:
    """Sinkhorn's iterations at ε = 1 and uniform weights.

    A pass over the cost matrix computes the density k = exp(f + g - C) of the plan once; its row sums r update f, and
    its column sums under the new f, which the same pass adds up, update g. After one pass in full log-sum-exp every
    r and c lies between 1/n and n, and stays there, so neither overflows nor vanishes from then on.
    """
    n, m = cost.shape
    f, g = torch.zeros(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    rows = max(1, _BLOCK_VALUES // m)
    parts = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    for part in parts:
        f[part] = -torch.logsumexp(-cost[part].double(), 1) + np.log(m)
    if symmetric:
        f = f / 2
        g = f.clone()
    else:
        total = torch.full((m,), -np.inf, dtype=torch.float64)
        for part in parts:
            total = torch.logaddexp(total, torch.logsumexp(f[part, None] - cost[part].double(), 0))
        g = np.log(n) - total
    iterations, violation = 0, np.inf
    buffer = torch.empty((min(rows, n), m), dtype=cost.dtype)
    while True:
        row_sums, column_sums, plan_cost = torch.empty_like(f), torch.zeros_like(g), 0.0
        f_rough, g_rough = f.to(cost.dtype), g.to(cost.dtype)
        final = iterations == max_iterations or violation <= tolerance
        for part in parts:
            density = torch.sub(g_rough, cost[part], out=buffer[: part.stop - part.start])
            density += f_rough[part, None]
            density.exp_()
            sums = density.sum(1).double() / m
            row_sums[part] = sums
            if final:
                plan_cost += float(torch.linalg.vecdot(density, cost[part]).double().sum()) / n / m
            elif not symmetric:
                column_sums += ((1 / (n * sums)).to(cost.dtype) @ density).double()
        if final:
            # A plan of mass 1 adds nothing to the dual; the symmetric updates come near it, no more.
            dual = float(f.mean() + g.mean() + 1 - row_sums.mean())
            return _Transport(dual, plan_cost, iterations, violation)
        violation = float((row_sums - 1).abs().mean())
        iterations += 1
        if violation <= tolerance:
            continue
        if symmetric:
            f = f - row_sums.log() / 2
            g = f
        else:
            f, g = f - row_sums.log(), g - column_sums.log()


def _common_steps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces on which both empirical quantile functions are constant: widths, and the order statistics there."""
    ends = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
    widths = np.diff(ends, prepend=0) / (n * m)
    return widths, (ends - 1) // m, (ends - 1) // n
