"""A single factor analyser, x = A z + μ + ε, fitted by EM to the samples of one cluster."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FactorAnalyser(NamedTuple):
    """Mean [n_features], factor loadings [n_features, n_factors] and noise variance [n_features]."""

    mean: Tensor
    factor_loadings: Tensor
    noise_variance: Tensor


def fit_factor_analyser(
    x: Tensor,
    n_factors: int,
    *,
    prior_count: float = 0.0,
    prior_variance: Tensor | None = None,
    noise_floor: float = 1e-6,
    isotropic: bool = False,
    n_iterations: int = 30,
    seed: int = 0,
) -> FactorAnalyser:
    """Maximum-likelihood (or MAP) factor analysis of x [n, n_features].

    EM with the sufficient statistics S W (S the covariance, W = D⁻¹ A (I + Aᵀ D⁻¹ A)⁻¹) computed from the samples,
    so that no [n_features, n_features] matrix is made (Ghahramani & Hinton 1996, eq. 5-8, for one component).
    It starts from the leading singular vectors. The result has `n_factors` columns whatever n is: with fewer
    samples the missing ones are zero. A single sample gives A = 0 and the prior's variance (or the floor).

    Args:
        x: samples [n, n_features], n >= 1.
        n_factors: number of factors l.
        prior_count: pseudo-samples ν of the prior on the noise variances.
        prior_variance: their variance v [n_features]; needed where prior_count > 0.
        noise_floor: smallest noise variance.
        isotropic: the same noise variance for all features (probabilistic principal component analysis).
        n_iterations: EM iterations.
        seed: for the randomised singular value decomposition.

    Raises:
        ValueError: no samples, or a prior count without a variance.
    """
    n, n_features = x.shape
    if n < 1:
        raise ValueError("factor analysis needs at least one sample")
    if prior_count > 0 and prior_variance is None:
        raise ValueError("prior_count needs prior_variance")
    mean = x.mean(0)
    centred = x - mean
    total = centred.square().mean(0)
    pseudo = torch.zeros_like(total) if prior_variance is None else prior_variance.to(x.dtype)

    def smoothed(residual: Tensor) -> Tensor:
        variance = (n * residual.clamp_min(0) + prior_count * pseudo) / (n + prior_count)
        return (variance.mean().expand_as(variance) if isotropic else variance).clamp_min(noise_floor)

    rank = min(n_factors, n - 1, n_features)
    loadings = x.new_zeros(n_features, n_factors)
    if rank <= 0:
        return FactorAnalyser(mean, loadings, smoothed(total))
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        _, singular, right = torch.svd_lowrank(centred, q=min(rank + 4, n, n_features), niter=4)
    active = right[:, :rank] * (singular[:rank] / n**0.5)
    noise = smoothed(total - active.square().sum(1))
    identity = torch.eye(rank, dtype=x.dtype, device=x.device)
    for _ in range(n_iterations):
        scaled = active / noise.unsqueeze(1)
        inverse = torch.linalg.inv(identity + active.T @ scaled)
        weights = scaled @ inverse
        cross = centred.T @ (centred @ weights) / n
        active = torch.linalg.solve(inverse + weights.T @ cross, cross, left=False)
        noise = smoothed(total - (active * cross).sum(1))
    loadings[:, :rank] = active
    return FactorAnalyser(mean, loadings, noise)
