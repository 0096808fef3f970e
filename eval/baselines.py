"""Baselines with full covariance matrices: one Gaussian, or a Gaussian mixture fitted by EM (scikit-learn)."""

from __future__ import annotations

import numpy as np
from sklearn.mixture import GaussianMixture

from data.errors import UserError


class FullGaussianMixture:
    """A fitted mixture of Gaussians with full covariance matrices over `[d]` features, in float64."""

    is_density = True

    def __init__(self, mixture: GaussianMixture) -> None:
        self._mixture = mixture
        self._factors = np.linalg.cholesky(mixture.covariances_)

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """log p(x) in nats for `[n, d]`; returns `[n]` float64."""
        return np.asarray(self._mixture.score_samples(np.asarray(x, np.float64)), np.float64)

    def sample(self, n: int, seed: int) -> np.ndarray:
        """`n` independent draws `[n, d]`; one seed gives one set of draws.

        (scikit-learn's own `sample` returns them sorted by component and keeps its seed in the model.)
        """
        rng = np.random.default_rng(seed)
        labels = rng.choice(len(self._mixture.weights_), size=n, p=self._mixture.weights_)
        x = rng.standard_normal((n, self._mixture.means_.shape[1]))
        for k in np.unique(labels):
            x[labels == k] = x[labels == k] @ self._factors[k].T + self._mixture.means_[k]
        return x


def fit_gaussian_mixture(x: np.ndarray, n_components: int, seed: int) -> FullGaussianMixture:
    """Fits a full-covariance mixture to `[n, d]` by EM from K-means; `n_components=1` is the single Gaussian.

    Maximises sum_i log sum_k pi_k N(x_i | mu_k, Sigma_k), with scikit-learn's default 1e-6 added to the diagonals.

    Raises:
        UserError: `x` is not `[n, d]`, holds NaN or infinite values, or has fewer samples than components.
    """
    values = np.asarray(x, np.float64)
    if values.ndim != 2:
        raise UserError(f"the baseline needs samples of shape [n, features], got {values.shape}: flatten them")
    if len(values) < max(2, n_components):
        raise UserError(f"{len(values)} samples are too few for {n_components} Gaussian components: use fewer")
    if not np.isfinite(values).all():
        raise UserError("the baseline's training samples hold NaN or infinite values: remove them first")
    return FullGaussianMixture(GaussianMixture(n_components, covariance_type="full", random_state=seed).fit(values))
