"""Mean and covariance of features, and the Fréchet distance (FID) between two sets of them.

Sources: M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS
2017, equation 6; T. Chan, G. Golub and R. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979. Imports only NumPy, torch and SciPy; faults raise `ValueError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from scipy.linalg import lapack

from eval.metrics import checks

MAX_FEATURES = 8192
_BLOCK_ROWS = 4096
# Optimal transport between directions whose spread is rounding has no meaning.
_SMALLEST_SPREAD = 1e-10


class Moments:
    """Number, mean `[d]` and scatter matrix `[d, d]` of feature vectors, in float64.

    Blocks are centred before they are squared and merged by Chan et al., so a large offset costs no digits.
    """

    def __init__(self, n_features: int) -> None:
        if not 1 <= n_features <= MAX_FEATURES:
            raise ValueError(
                f"a covariance takes 1 to {MAX_FEATURES} features, got {n_features}: "
                "use a feature extractor, or project the samples to fewer dimensions"
            )
        self.n = 0
        self.mean = np.zeros(n_features)
        self.scatter = np.zeros((n_features, n_features))

    def update(self, features: np.ndarray) -> None:
        """Takes in features `[n, d]`.

        Raises:
            ValueError: another number of features, or values that are not finite.
        """
        values = checks.features(features, "features", least=0)
        if values.shape[1] != len(self.mean):
            raise ValueError(f"features: {len(self.mean)} per sample are expected, got {values.shape[1]}")
        for start in range(0, len(values), _BLOCK_ROWS):
            block = values[start : start + _BLOCK_ROWS].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            # The mean's own rounding, which matters where the offset is large.
            shift = block.mean(axis=0)
            block -= shift
            self._add(len(block), mean + shift, block.T @ block)

    def merge(self, other: Self) -> None:
        """Takes in what another one has seen.

        Raises:
            ValueError: another number of features.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and of {len(other.mean)} features cannot be merged")
        if other.n:
            self._add(other.n, other.mean, other.scatter)

    def covariance(self) -> np.ndarray:
        """The unbiased covariance matrix `[d, d]` (divisor n - 1).

        Raises:
            ValueError: fewer than two samples.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}: take more")
        return self.scatter / (self.n - 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """The state: `n`, `mean` `[d]`, `scatter` `[d, d]`."""
        return {"n": np.asarray(self.n, np.int64), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The moments of that state."""
        moments = cls(len(arrays["mean"]))
        moments.n = int(arrays["n"])
        moments.mean, moments.scatter = arrays["mean"].astype(np.float64), arrays["scatter"].astype(np.float64)
        return moments

    def _add(self, n: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        """Chan et al., equation 2.1, for vectors."""
        total, delta = self.n + n, mean - self.mean
        self.scatter += scatter
        if self.n:
            self.scatter += np.outer(delta * (self.n * (n / total)), delta)
        self.mean = self.mean + delta * (n / total)
        self.n = total


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance between the Gaussians of two sets' moments: FID, where features are Inception's.

        FID = |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½)

    With S = L Lᵀ the last trace is the sum of the singular values of L_aᵀ L_b, which stays accurate for singular
    covariances (fewer samples than features, constant features). It is biased upwards by finite samples: compare
    only at equal sample sizes.

    Raises:
        ValueError: different numbers of features, or fewer than two samples.
    """
    product = _factor(a).T @ _factor(_same_features(a, b))
    # torch's LAPACK: several times faster than NumPy's on a busy machine.
    overlap = float(torch.linalg.svdvals(torch.from_numpy(product)).sum())
    spread = float(np.trace(a.covariance()) + np.trace(b.covariance()))
    # Rounding may leave -1e-14 for equal sets, and a squared distance is never negative.
    return max(0.0, float(np.square(a.mean - b.mean).sum()) + spread - 2 * overlap)


def frechet_standard_error(a: Moments, b: Moments, features_a: np.ndarray, features_b: np.ndarray) -> float:
    """The standard error of `frechet_distance(a, b)` over the drawing of both sets, by the delta method.

    With T the optimal transport map from Gaussian b to Gaussian a (T S_b T = S_a), a sample x of b moves the distance
    in proportion to

        IF_b(x) = 2 (m_b - m_a)ᵀ (x - m_b) + (x - m_b)ᵀ (I - T) (x - m_b) - tr(S_b (I - T))

    and a sample of a likewise, with T's inverse; the variance is var(IF_a) / n_a + var(IF_b) / n_b. The variances are
    estimated from the subsamples `features_a` and `features_b` `[n, d]` of the two sets. First order: it covers the
    spread, not the bias, and falls short where both distributions are equal or samples are not many more than features.

    Raises:
        ValueError: as `frechet_distance`, or unusable subsamples.
    """
    subsamples = checks.pair(features_a, features_b, ("features_a", "features_b"))
    if subsamples[0].shape[1] != len(a.mean):
        raise ValueError(f"the subsamples have {subsamples[0].shape[1]} features, the moments {len(a.mean)}")
    factor_a, factor_b = _factor(a), _factor(_same_features(a, b))
    product = torch.from_numpy(factor_a.T @ factor_b)
    left, spread, right = (part.numpy() for part in torch.linalg.svd(product, full_matrices=False))
    kept = spread > _SMALLEST_SPREAD * spread.max(initial=0.0)
    root = 1 / np.sqrt(spread[kept])
    # The map to a is to_a to_aᵀ, its inverse to_b to_bᵀ: (L_a U) Σ⁻¹ (L_a U)ᵀ and (L_b V) Σ⁻¹ (L_b V)ᵀ.
    to_a, to_b = factor_a @ (left[:, kept] * root), factor_b @ (right[kept].T * root)
    variance = 0.0
    for own, other, plan, sample in ((a, b, to_b, subsamples[0]), (b, a, to_a, subsamples[1])):
        parts = []
        for start in range(0, len(sample), _BLOCK_ROWS):
            x = sample[start : start + _BLOCK_ROWS] - own.mean
            quadratic = np.einsum("nd,nd->n", x, x) - np.square(x @ plan).sum(axis=1)
            parts.append(2 * (x @ (own.mean - other.mean)) + quadratic)
        variance += float(np.concatenate(parts).var(ddof=1)) / own.n
    return float(np.sqrt(variance))


def _same_features(a: Moments, b: Moments) -> Moments:
    """The second, of as many features as the first."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} and {len(b.mean)} features: compute both by one feature extractor")
    return b


def _factor(moments: Moments) -> np.ndarray:
    """L `[d, rank]` with L Lᵀ the covariance: the pivoted Cholesky factor of the correlation matrix, scaled back.

    On correlations, "singular" does not depend on the features' units.
    """
    covariance = moments.covariance()
    scale = np.sqrt(np.diag(covariance))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    covariance *= inverse[:, None]
    covariance *= inverse
    packed, pivots, rank, _ = lapack.dpstrf(covariance, lower=1, overwrite_a=1)
    factor = np.empty((len(scale), rank))
    factor[pivots - 1] = np.tril(packed[:, :rank])
    factor *= scale[:, None]
    return factor
