"""The average log-likelihood of held-out samples, with its standard error and bits per dimension."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.errors import UserError


@dataclass(frozen=True)
class LogLikelihood:
    """Mean log-likelihood over `n` samples in nats per sample, its standard error, and bits per dimension."""

    mean: float
    standard_error: float
    n: int
    bits_per_dimension: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.standard_error:.2f}"


def summarise(log_probs: np.ndarray, *, n_dimensions: int | None = None, levels: int = 256) -> LogLikelihood:
    """Mean and standard error of log p(x) (`[n]`, nats per sample) in float64.

        standard error = s / sqrt(n),   s the sample standard deviation (divisor n - 1)
        bits per dimension = -mean / (d ln 2) + log2(levels)

    Bits per dimension are given where `n_dimensions` (d) is: for data that took `levels` values per dimension,
    dequantised by uniform noise and scaled to [0, 1], where the density of x is levels^d times that of the values
    themselves. Leave `n_dimensions` out for data that never were quantised. Source of the bound: L. Theis, A. van
    den Oord and M. Bethge, "A note on the evaluation of generative models", ICLR 2016, section 3.1.

    Raises:
        UserError: fewer than two values, or values that are not finite.
    """
    values = np.asarray(log_probs, np.float64).reshape(-1)
    if values.size < 2:
        raise UserError(f"a standard error needs at least 2 log-likelihoods, got {values.size}: evaluate more")
    broken = int(np.count_nonzero(~np.isfinite(values)))
    if broken:
        raise UserError(f"{broken} of {values.size} log-likelihoods are not finite: check data and training")
    mean = float(values.mean())
    squares = float(np.square(values - mean).sum())
    return of_moments(values.size, mean, squares, n_dimensions=n_dimensions, levels=levels)


def of_moments(
    n: int, mean: float, squares: float, *, n_dimensions: int | None = None, levels: int = 256
) -> LogLikelihood:
    """`summarise` of n values by their mean and the sum of their squared deviations from it.

    Raises:
        UserError: fewer than two values, or values that are not finite.
    """
    if n < 2:
        raise UserError(f"a standard error needs at least 2 log-likelihoods, got {n}: evaluate more")
    if not (math.isfinite(mean) and math.isfinite(squares)):
        raise UserError("some log-likelihoods are not finite: check data and training")
    bits = None if n_dimensions is None else -mean / (n_dimensions * math.log(2)) + math.log2(levels)
    return LogLikelihood(mean, math.sqrt(squares / (n - 1) / n), int(n), bits)
