"""Mixture of factor analysers: exact likelihood, responsibilities and samples of high-dimensional data.

This file imports only torch and the standard library, so that it travels with a registered model as it is.

References:
    Z. Ghahramani, G. Hinton, The EM Algorithm for Mixtures of Factor Analyzers, CRG-TR-96-1, 1996.
    E. Richardson, Y. Weiss, On GANs and GMMs, NeurIPS 2018 (supplement §1.2).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Precision(NamedTuple):
    """What `log_prob` needs of all components: the inverse covariances in factored form, about a common origin."""

    origin: Tensor  # [n_features]
    inverse_noise: Tensor  # [n_components, n_features]
    weighted_mean: Tensor  # [n_components, n_features]: D⁻¹ (μ - origin)
    projection: Tensor  # [n_components, n_factors, n_features]: L⁻¹ Aᵀ D⁻¹ with L Lᵀ = I + Aᵀ D⁻¹ A
    projected_mean: Tensor  # [n_components, n_factors]
    mean_square: Tensor  # [n_components]: (μ - origin)ᵀ D⁻¹ (μ - origin)
    inverse_cholesky: Tensor  # [n_components, n_factors, n_factors]: L⁻¹
    constant: Tensor  # [n_components]: log π - ½ log |2π Σ|


class MFA(nn.Module):
    """Mixture of factor analysers, p(x) = Σ_k π_k N(x; μ_k, A_k A_kᵀ + D_k) with diagonal D_k.

    Parameters (shapes): `mixing_logits` [n_components], `means` [n_components, n_features],
    `factor_loadings` [n_components, n_features, n_factors], `log_noise_variance` [n_components, n_features].
    The noise variance is D = noise_floor + exp(log_noise_variance), positive by construction.

    A prior on the noise variances of `noise_prior_count` pseudo-samples of variance `noise_prior_variance` (per
    component and feature) can be set; maximising log-likelihood + log-prior then gives the MAP estimate
    D = (N S + ν v) / (N + ν) of an EM step. Without it a feature that is constant in a component drives its
    variance to the floor, and one test sample that differs there costs hundreds of nats.

    Args:
        n_components: number of mixture components K.
        n_features: dimension d of a flattened sample.
        n_factors: number of factors l, the columns of A.
        noise_floor: smallest noise variance.
    """

    def __init__(self, n_components: int, n_features: int, n_factors: int, noise_floor: float = 1e-6) -> None:
        super().__init__()
        if min(n_components, n_features) < 1 or n_factors < 0 or noise_floor <= 0:
            raise ValueError("an MFA needs n_components >= 1, n_features >= 1, n_factors >= 0 and noise_floor > 0")
        self.n_components, self.n_features, self.n_factors = n_components, n_features, n_factors
        self.noise_floor = float(noise_floor)
        self.mixing_logits = nn.Parameter(torch.zeros(n_components))
        self.means = nn.Parameter(torch.zeros(n_components, n_features))
        self.factor_loadings = nn.Parameter(torch.zeros(n_components, n_features, n_factors))
        self.log_noise_variance = nn.Parameter(torch.zeros(n_components, n_features))
        self.noise_prior_count: Tensor
        self.noise_prior_variance: Tensor
        self.register_buffer("noise_prior_count", torch.zeros(()))
        self.register_buffer("noise_prior_variance", torch.ones(n_components, n_features))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "n_components": self.n_components,
            "n_features": self.n_features,
            "n_factors": self.n_factors,
            "noise_floor": self.noise_floor,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items())

    @property
    def noise_variance(self) -> Tensor:
        """Diagonal noise variances D, [n_components, n_features]."""
        return self.noise_floor + self.log_noise_variance.exp()

    @property
    def mixing_coefficients(self) -> Tensor:
        """Mixing coefficients π, [n_components]; they sum to one."""
        return self.mixing_logits.softmax(0)

    @torch.no_grad()
    def set_components(self, mixing: Tensor, means: Tensor, factor_loadings: Tensor, noise_variance: Tensor) -> None:
        """Sets π, μ, A and D. A has at most n_factors columns (missing ones become zero); D is held above the floor."""
        tiny = torch.finfo(self.mixing_logits.dtype).tiny
        self.mixing_logits.copy_(mixing.double().clamp_min(tiny).log())
        self.means.copy_(means)
        self.factor_loadings.zero_()
        self.factor_loadings[..., : factor_loadings.shape[-1]].copy_(factor_loadings)
        # Rounding may not take a variance below the floor: then log(D - floor) would not exist.
        above = (noise_variance.double() - self.noise_floor).clamp_min(1e-3 * self.noise_floor)
        self.log_noise_variance.copy_(above.log())

    @torch.no_grad()
    def set_noise_prior(self, count: float, variance: Tensor) -> None:
        """Sets the prior: `count` pseudo-samples (ν ≥ 0) of `variance` (v, broadcast to [n_components, n_features])."""
        self.noise_prior_count.fill_(count)
        self.noise_prior_variance.copy_(variance.expand_as(self.noise_prior_variance))

    def _precision(self) -> _Precision:
        noise, loadings = self.noise_variance, self.factor_loadings
        inverse = noise.reciprocal()
        scaled = loadings * inverse.unsqueeze(-1)
        # The l x l systems are cheap and may be badly conditioned: float64 whatever the parameters' type.
        inner = (loadings.mT @ scaled).double() + torch.eye(self.n_factors, dtype=torch.float64, device=noise.device)
        cholesky = torch.linalg.cholesky(inner)
        identity = torch.eye(self.n_factors, dtype=torch.float64, device=noise.device).expand_as(inner)
        inverse_cholesky = torch.linalg.solve_triangular(cholesky, identity, upper=False).to(noise.dtype)
        projection = inverse_cholesky @ scaled.mT
        # Distances are expanded into matrix products; about the overall mean the terms that cancel are smallest.
        origin = (self.mixing_coefficients @ self.means).detach()
        centred = self.means - origin
        log_det = noise.log().sum(1) + 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1).to(noise.dtype)
        constant = self.mixing_logits.log_softmax(0) - 0.5 * (self.n_features * math.log(2 * math.pi) + log_det)
        projected = (projection @ centred.unsqueeze(-1)).squeeze(-1)
        mean_square = (centred.square() * inverse).sum(1)
        return _Precision(
            origin, inverse, centred * inverse, projection, projected, mean_square, inverse_cholesky, constant
        )

    def _by_products(self, x: Tensor) -> tuple[Tensor, Tensor, _Precision, Tensor]:
        """Component log-densities by matrix products alone, the size of the terms that cancelled in each
        [batch, n_components], the precisions, and the samples about the origin."""
        flat = x.flatten(1)
        if flat.shape[1] != self.n_features:
            raise ValueError(f"samples have {flat.shape[1]} features, the model has {self.n_features}")
        p = self._precision()
        centred = flat.to(p.origin.dtype) - p.origin
        squares = centred.square() @ p.inverse_noise.T + p.mean_square
        cross = 2 * (centred @ p.weighted_mean.T)
        projected = centred @ p.projection.flatten(0, 1).T
        projected = projected.unflatten(1, (self.n_components, self.n_factors)) - p.projected_mean
        distance = squares - cross - projected.square().sum(-1)
        return p.constant - 0.5 * distance, squares, p, centred

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log π_k + log N(x; μ_k, A_k A_kᵀ + D_k) in nats, [batch, n_components], for x [batch, ...].

        By the Woodbury identity the Mahalanobis distance is (x-μ)ᵀ D⁻¹ (x-μ) - |L⁻¹ Aᵀ D⁻¹ (x-μ)|²; both terms
        are matrix products over all components at once. Where their difference loses digits and the component
        matters for the sample, the distance is computed again without that difference (`_refined`).

        Raises:
            ValueError: x does not have n_features values per sample.
        """
        joint, squares, p, centred = self._by_products(x)
        return self._refined(joint, squares, p, centred)

    def _refined(self, joint: Tensor, squares: Tensor, p: _Precision, centred: Tensor) -> Tensor:
        """Replaces the values of likely components that rounding has reached.

        The distance is also min_z (x-μ-Az)ᵀ D⁻¹ (x-μ-Az) + zᵀz, taken at the posterior mean of z: a sum of
        squares, in which an error of z enters only squared. It costs one pass over the features per (sample,
        component), so it is done for the few pairs that need it.
        """
        with torch.no_grad():
            error = 16 * torch.finfo(joint.dtype).eps * squares
            likely = joint + error > (joint - error).amax(1, keepdim=True) - 20
            pairs = (likely & (error > 1e-5 * joint.abs())).T.nonzero()
        if not len(pairs):
            return joint
        components, counts = pairs[:, 0].unique_consecutive(return_counts=True)
        values = []
        for k, rows in zip(components.tolist(), pairs[:, 1].split(counts.tolist()), strict=True):
            difference = centred[rows] - (self.means[k] - p.origin)
            z = difference @ p.projection[k].T @ p.inverse_cholesky[k]
            rest = difference - z @ self.factor_loadings[k].T
            values.append(p.constant[k] - 0.5 * (rest.square() @ p.inverse_noise[k] + z.square().sum(1)))
        return joint.index_put((pairs[:, 1], pairs[:, 0]), torch.cat(values))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, [batch], for x [batch, ...]."""
        return self.component_log_prob(x).logsumexp(1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probabilities p(k | x), [batch, n_components]."""
        return self.component_log_prob(x).softmax(1)

    def log_prior(self) -> Tensor:
        """Log-density of the noise variances under their prior, up to a constant: -ν/2 Σ (log D + v / D), in nats."""
        noise = self.noise_variance
        return -0.5 * self.noise_prior_count * (noise.log() + self.noise_prior_variance / noise).sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(log p(x) [batch], log-prior []): everything that training needs, in one call that engines can wrap.

        By matrix products alone: rounding there is far below the noise of a gradient from a batch.
        """
        return self._by_products(x)[0].logsumexp(1), self.log_prior()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, *, noise: bool = True) -> Tensor:
        """Draws n samples [n, n_features]; without `noise` they lie on the components' subspaces (μ + A z)."""
        device = self.means.device
        component = torch.multinomial(self.mixing_coefficients.double(), n, replacement=True, generator=generator)
        z = torch.randn(n, self.n_factors, generator=generator, dtype=self.means.dtype, device=device)
        out = self.means[component]
        if noise:
            ε = torch.randn(n, self.n_features, generator=generator, dtype=self.means.dtype, device=device)
            out += ε * self.noise_variance.sqrt()[component]
        # Component by component, so that no [n, n_features, n_factors] tensor is ever made.
        order = component.argsort()
        counts = torch.bincount(component, minlength=self.n_components).tolist()
        for k, rows in enumerate(order.split(counts)):
            if len(rows):
                out[rows] += z[rows] @ self.factor_loadings[k].T
        return out


MODEL = MFA
