"""KID: the maximum mean discrepancy between two sets of features under a cubic kernel.

Source: M. Bińkowski et al., "Demystifying MMD GANs", ICLR 2018, section 3 and appendix. Imports only NumPy; faults
raise `ValueError`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.metrics import checks


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of MMD² over random subsets, and how they were drawn."""

    mean: float
    standard_deviation: float
    subsets: int
    subset_size: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID between features `[n, d]` and `[m, d]`: unbiased, so it may be negative and compares across sample sizes.

        k(x, y) = (xᵀy / d + 1)³
        MMD² = mean over i ≠ j of k(a_i, a_j) + mean over i ≠ j of k(b_i, b_j) - 2 mean k(a_i, b_j)

    averaged over `subsets` pairs of subsets, each of `subset_size` samples drawn without replacement; the standard
    deviation is over the subsets (divisor `subsets`). Computed in float64. The kernel sees offset and scale.

    Raises:
        ValueError: unusable features, or subsets of fewer than 2 or more than the smaller set's samples.
    """
    a, b = checks.pair(a, b, ("a", "b"))
    smaller = min(len(a), len(b))
    if not 2 <= subset_size <= smaller:
        raise ValueError(f"subset_size must be 2 to {smaller}, the size of the smaller set, got {subset_size}")
    if subsets < 1:
        raise ValueError(f"at least one subset is needed, got {subsets}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = a[rng.choice(len(a), subset_size, replace=False)].astype(np.float64)
        y = b[rng.choice(len(b), subset_size, replace=False)].astype(np.float64)
        within = _off_diagonal_mean(_kernel(x, x)) + _off_diagonal_mean(_kernel(y, y))
        values.append(within - 2 * float(_kernel(x, y).mean()))
    return KernelDistance(float(np.mean(values)), float(np.std(values)), subsets, subset_size, seed)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(xᵀy / d + 1)³ of all pairs; the power by products, which are many times faster."""
    values = x @ y.T
    values /= x.shape[1]
    values += 1
    squares = values * values
    squares *= values
    return squares


def _off_diagonal_mean(kernel: np.ndarray) -> float:
    n = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))
