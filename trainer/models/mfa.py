"""Mixture of factor analysers: exact likelihood, responsibilities and samples of high-dimensional data.

This file imports only torch, the standard library and its neighbours: with these it travels in a registered model.

References:
    Z. Ghahramani, G. Hinton, The EM Algorithm for Mixtures of Factor Analyzers, CRG-TR-96-1, 1996.
    E. Richardson, Y. Weiss, On GANs and GMMs, NeurIPS 2018 (supplement §1.2).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

# Working memory of what is computed component by component (in float64).
_WORKING_BYTES = 64 << 20
_CACHED_BYTES = 4 << 20


class Precision(NamedTuple):
    """What `log_prob` needs of all components: the inverse covariances in factored form, about a common origin."""

    origin: Tensor  # [n_features]
    inverse_noise: Tensor  # [n_components, n_features], or [n_components, 1] for isotropic noise
    weighted_mean: Tensor  # [n_components, n_features]: D⁻¹ (μ - origin)
    projection: Tensor  # [n_components, n_factors, n_features]: L⁻¹ Aᵀ D⁻¹ with L Lᵀ = I + Aᵀ D⁻¹ A
    projected_mean: Tensor  # [n_components, n_factors]
    mean_square: Tensor  # [n_components]: (μ - origin)ᵀ D⁻¹ (μ - origin)
    cholesky: Tensor  # [n_components, n_factors, n_factors]: L
    constant: Tensor  # [n_components] float64: log π - ½ log |2π Σ|


class MFA(nn.Module):
    """Mixture of factor analysers, p(x) = Σ_k π_k N(x; μ_k, A_k A_kᵀ + D_k) with diagonal D_k.

    Parameters (shapes): `mixing_logits` [n_components], `means` [n_components, n_features],
    `factor_loadings` [n_components, n_features, n_factors], `log_noise_variance` [n_components, n_features], or
    [n_components, 1] where the noise is isotropic (a mixture of probabilistic principal component analysers).
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
        noise: "diagonal", a variance per feature (MFA), or "isotropic", one per component (MPPCA; Tipping & Bishop).
    """

    def __init__(
        self,
        n_components: int,
        n_features: int,
        n_factors: int,
        noise_floor: float = 1e-6,
        noise: Literal["diagonal", "isotropic"] = "diagonal",
    ) -> None:
        super().__init__()
        if min(n_components, n_features) < 1 or n_factors < 0 or noise_floor <= 0:
            raise ValueError("an MFA needs n_components >= 1, n_features >= 1, n_factors >= 0 and noise_floor > 0")
        if noise not in ("diagonal", "isotropic"):
            raise ValueError(f"noise must be diagonal or isotropic, not {noise!r}")
        self.n_components, self.n_features, self.n_factors = n_components, n_features, n_factors
        self.noise_floor, self.noise = float(noise_floor), noise
        columns = n_features if noise == "diagonal" else 1
        self.mixing_logits = nn.Parameter(torch.zeros(n_components))
        self.means = nn.Parameter(torch.zeros(n_components, n_features))
        self.factor_loadings = nn.Parameter(torch.zeros(n_components, n_features, n_factors))
        self.log_noise_variance = nn.Parameter(torch.zeros(n_components, columns))
        self.noise_prior_count: Tensor
        self.noise_prior_variance: Tensor
        self.register_buffer("noise_prior_count", torch.zeros(()))
        self.register_buffer("noise_prior_variance", torch.ones(n_components, columns))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "n_components": self.n_components,
            "n_features": self.n_features,
            "n_factors": self.n_factors,
            "noise_floor": self.noise_floor,
            "noise": self.noise,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items())

    @property
    def noise_variance(self) -> Tensor:
        """Noise variances D, [n_components, n_features] (a view of [n_components, 1] where they are isotropic)."""
        return (self.noise_floor + self.log_noise_variance.exp()).expand_as(self.means)

    @property
    def mixing_coefficients(self) -> Tensor:
        """Mixing coefficients π, [n_components] float64; they sum to one."""
        return self.mixing_logits.double().softmax(0)

    @torch.no_grad()
    def set_components(self, mixing: Tensor, means: Tensor, factor_loadings: Tensor, noise_variance: Tensor) -> None:
        """Sets π, μ, A and D. A has at most n_factors columns (missing ones become zero); D is held above the floor.

        Isotropic noise takes the mean of each row of D.
        """
        tiny = torch.finfo(self.mixing_logits.dtype).tiny
        self.mixing_logits.copy_(mixing.double().clamp_min(tiny).log())
        self.means.copy_(means)
        self.factor_loadings.zero_()
        self.factor_loadings[..., : factor_loadings.shape[-1]].copy_(factor_loadings)
        # Rounding may not take a variance below the floor: then log(D - floor) would not exist.
        above = (self._columns(noise_variance.double()) - self.noise_floor).clamp_min(1e-3 * self.noise_floor)
        self.log_noise_variance.copy_(above.log())

    @torch.no_grad()
    def set_noise_prior(self, count: float, variance: Tensor) -> None:
        """Sets the prior: `count` pseudo-samples (ν ≥ 0) of `variance` (v, broadcast to [n_components, n_features])."""
        self.noise_prior_count.fill_(count)
        self.noise_prior_variance.copy_(self._columns(variance).expand_as(self.noise_prior_variance))

    def _columns(self, variance: Tensor) -> Tensor:
        """Per-feature variances as this model keeps them: as they are, or their mean over the features."""
        return variance if self.noise == "diagonal" else variance.mean(-1, keepdim=True)

    def component_slices(self) -> list[slice]:
        """Consecutive components, so many that their loadings fit into the working memory of a computation."""
        step = max(1, _WORKING_BYTES // (8 * self.n_features * (self.n_factors + 1)))
        return [slice(i, min(i + step, self.n_components)) for i in range(0, self.n_components, step)]

    def precision(self, dtype: torch.dtype) -> Precision:
        """The factored inverse covariances, in `dtype`; what may be badly conditioned is computed in float64."""
        # Distances are expanded into matrix products; about the overall mean the terms that cancel are smallest.
        origin = (self.mixing_coefficients.to(self.means.dtype) @ self.means).double().detach()
        log_mixing = self.mixing_logits.double().log_softmax(0)
        slices = self.component_slices()

        def cast(found: tuple[Tensor, ...]) -> list[Tensor]:
            return [*(part.to(dtype).contiguous() for part in found[:-1]), found[-1]]

        if len(slices) == 1 or torch.is_grad_enabled():
            parts = [cast(self._precision(s, origin, log_mixing[s])) for s in slices]
            columns = [column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True)]
        else:  # the projections are as large as the loadings: never twice in memory
            columns = []
            for chosen in slices:
                found = cast(self._precision(chosen, origin, log_mixing[chosen]))
                columns = columns or [part.new_empty(self.n_components, *part.shape[1:]) for part in found]
                for column, part in zip(columns, found, strict=True):
                    column[chosen] = part
        return Precision(origin.to(dtype), *columns)

    def _precision(self, chosen: slice, origin: Tensor, log_mixing: Tensor) -> tuple[Tensor, ...]:
        variance = (self.noise_floor + self.log_noise_variance[chosen].exp()).double()
        loadings, centred = self.factor_loadings[chosen].double(), self.means[chosen].double() - origin
        inverse = variance.reciprocal()
        scaled = loadings * inverse.unsqueeze(-1)
        identity = torch.eye(self.n_factors, dtype=torch.float64, device=variance.device)
        cholesky = torch.linalg.cholesky(loadings.mT @ scaled + identity)
        projection = torch.linalg.solve_triangular(cholesky, scaled.mT, upper=False)
        repeats = self.n_features // variance.shape[1]
        log_det = repeats * variance.log().sum(1) + 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = log_mixing - 0.5 * (self.n_features * math.log(2 * math.pi) + log_det)
        weighted = centred * inverse
        projected = (projection @ centred.unsqueeze(-1)).squeeze(-1)
        return inverse, weighted, projection, projected, (centred * weighted).sum(1), cholesky, constant

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log π_k + log N(x; μ_k, A_k A_kᵀ + D_k) in nats, [batch, n_components], for x [batch, ...].

        By the Woodbury identity the Mahalanobis distance is (x-μ)ᵀ D⁻¹ (x-μ) - |L⁻¹ Aᵀ D⁻¹ (x-μ)|². Both terms can
        exceed their difference by orders of magnitude: samples for which float32 may have lost more than 2e-5 of a
        likely component's value (and 0.01 nats) are computed again in float64.

        Raises:
            ValueError: x does not have n_features values per sample.
        """
        flat = x.flatten(1).to(self.means.dtype)
        if flat.shape[1] != self.n_features:
            raise ValueError(f"samples have {flat.shape[1]} features, the model has {self.n_features}")
        p = self.precision(flat.dtype)
        if torch.is_grad_enabled():
            joint, inexact = _joint_and_inexact(flat, p)
        else:  # in pieces whose products stay in the processor's cache
            width = self.n_features + self.n_components * self.n_factors
            step = max(256, _CACHED_BYTES // (flat.element_size() * width))
            parts = [_joint_and_inexact(part, p) for part in flat.split(step)]
            joint, inexact = (torch.cat(column) for column in zip(*parts, strict=True))
        rows = inexact.nonzero().squeeze(1)
        if not len(rows):
            return joint
        exact, _ = log_joint_by_products(flat[rows].double(), self.precision(torch.float64))
        return joint.index_put((rows,), exact.to(joint.dtype))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, [batch], for x [batch, ...]."""
        return self.component_log_prob(x).logsumexp(1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probabilities p(k | x), [batch, n_components]."""
        return self.component_log_prob(x).softmax(1)

    def map_component(self, x: Tensor) -> Tensor:
        """The most probable component of each sample, argmax_k p(k | x), [batch] int64."""
        return self.component_log_prob(x).argmax(1)

    def latent_posterior(self, x: Tensor, component: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Posterior of the factors, p(z | x, k): means [batch, n_factors], covariances [batch, n_factors, n_factors].

        Mean (I + Aᵀ D⁻¹ A)⁻¹ Aᵀ D⁻¹ (x - μ) and covariance (I + Aᵀ D⁻¹ A)⁻¹ of `component` [batch], by default each
        sample's most probable one.
        """
        flat = x.flatten(1).to(self.means.dtype)
        component = self.map_component(x) if component is None else component
        mean = flat.new_zeros(len(flat), self.n_factors)
        covariance = flat.new_zeros(len(flat), self.n_factors, self.n_factors)
        p = self.precision(flat.dtype)
        for k in component.unique().tolist():
            rows = component == k
            u = (flat[rows] - self.means[k]) @ p.projection[k].T
            mean[rows] = torch.linalg.solve_triangular(p.cholesky[k].T, u.T, upper=True).T
            covariance[rows] = torch.cholesky_inverse(p.cholesky[k])
        return mean, covariance

    def decode(self, z: Tensor, component: Tensor) -> Tensor:
        """μ + A z of each sample's component, [batch, n_features], for factors z [batch, n_factors]."""
        out = self.means[component]
        for k in component.unique().tolist():
            rows = component == k
            out[rows] = out[rows] + z[rows] @ self.factor_loadings[k].T
        return out

    def reconstruct(self, x: Tensor) -> Tensor:
        """μ + A E[z | x] of the most probable component, [batch, n_features]: the sample without its noise."""
        component = self.map_component(x)
        return self.decode(self.latent_posterior(x, component)[0], component)

    def inpaint(self, x: Tensor, observed: Tensor, **options: Any) -> Tensor:
        """Fills in the hidden features of samples x [batch, ...]; see `trainer.models.inpainting.inpaint`."""
        from trainer.models.inpainting import inpaint

        return inpaint(self, x, observed, **options)

    def log_prior(self) -> Tensor:
        """Log-density of the noise variances under their prior, up to a constant: -ν/2 Σ (log D + v / D), in nats.

        The sum is over components and features, for isotropic noise too: there each feature has the same D and v.
        """
        noise = self.noise_variance
        return -0.5 * self.noise_prior_count * (noise.log() + self.noise_prior_variance / noise).sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(log p(x) [batch], log-prior []): everything that training needs, in one call that engines can wrap."""
        return self.log_prob(x), self.log_prior()

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None, *, noise: bool = True, component: int | None = None
    ) -> Tensor:
        """Draws n samples [n, n_features], of all components or of one.

        Without `noise` they lie on the components' subspaces (μ + A z).
        """
        device = self.means.device
        chosen = torch.multinomial(self.mixing_coefficients, n, replacement=True, generator=generator)
        if component is not None:
            chosen.fill_(range(self.n_components)[component])
        z = torch.randn(n, self.n_factors, generator=generator, dtype=self.means.dtype, device=device)
        out = self.means[chosen]
        if noise:
            ε = torch.randn(n, self.n_features, generator=generator, dtype=self.means.dtype, device=device)
            out += ε * self.noise_variance.sqrt()[chosen]
        # Component by component, so that no [n, n_features, n_factors] tensor is ever made.
        order = chosen.argsort()
        counts = torch.bincount(chosen, minlength=self.n_components).tolist()
        for k, rows in enumerate(order.split(counts)):
            if len(rows):
                out[rows] += z[rows] @ self.factor_loadings[k].T
        return out


def log_joint_by_products(flat: Tensor, p: Precision) -> tuple[Tensor, Tensor]:
    """log π_k + log N(x; μ_k, Σ_k), and a bound of its rounding error, both [batch, n_components], in nats.

    Computed in the dtype of the samples `flat` [batch, n_features] by matrix products over all components at once.
    """
    centred = flat - p.origin
    squares = centred.square()
    if p.inverse_noise.shape[1] == 1:
        squares = squares.sum(1, keepdim=True)
    squares = squares @ p.inverse_noise.T + p.mean_square
    projected = centred @ p.projection.flatten(0, 1).T
    projected = projected.unflatten(1, p.projected_mean.shape) - p.projected_mean
    quadratic = 0.5 * squares - centred @ p.weighted_mean.T - 0.5 * projected.square().sum(-1)
    # Measured: the error stays below half of this up to 50,000 features.
    growth = 4 * max(1.0, math.sqrt(flat.shape[1] / 784))
    return p.constant.to(flat.dtype) - quadratic, growth * torch.finfo(flat.dtype).eps * squares


def _joint_and_inexact(flat: Tensor, p: Precision) -> tuple[Tensor, Tensor]:
    """`log_joint_by_products`, and for which samples [batch] it may not be exact enough."""
    joint, error = log_joint_by_products(flat, p)
    if joint.dtype == torch.float64:
        return joint, joint.new_zeros(len(joint), dtype=torch.bool)
    with torch.no_grad():
        tolerance = (2e-5 * joint.abs()).clamp_min(0.01)
        return joint, (may_matter(joint, error) & ~(error <= tolerance)).any(1)


def may_matter(joint: Tensor, error: Tensor) -> Tensor:
    """Which components may have more than e^-20 of the likeliest one's share of a sample, given bounds of error."""
    return joint + error > (joint - error).amax(1, keepdim=True) - 20


MODEL = MFA
