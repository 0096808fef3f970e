"""In-painting by a mixture of factor analysers: what the hidden features of a sample may be, given the others.

Every sample may have its own set of observed features. The mixture's marginal over them is a mixture of factor
analysers again, whose sums over features become matrix products with the masks (Richardson & Weiss 2018, supplement
§1.3). All of it is computed in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.models.mfa import MFA

_CHUNK_BYTES = 64 << 20

Mode = Literal["map", "mean", "sample"]


class Conditional(NamedTuple):
    """What the observed features say: about the component, and in each component about the factors.

    `log_joint` [n, K] is log π_k + log p(x_observed | k) in nats, `mean` [n, K, l] is E[z | x_observed, k] and
    `cholesky` [n, K, l, l] the lower factor of the precision of z.
    """

    log_joint: Tensor
    mean: Tensor
    cholesky: Tensor

    def responsibilities(self) -> Tensor:
        """p(k | x_observed), [n, K]."""
        return self.log_joint.softmax(1)


@torch.no_grad()
def condition(model: MFA, x: Tensor, observed: Tensor) -> Conditional:
    """Conditions the mixture on some features of each sample.

    Args:
        model: the mixture.
        x: samples [n, ...]; hidden values are ignored, and may be NaN.
        observed: boolean, of the same shape, or of one sample's shape for all alike.

    Raises:
        ValueError: shapes that do not fit.
    """
    flat, mask = _flat(model, x, observed)
    # About the mixture's mean, so that an offset common to data and means cancels before anything is squared.
    origin = model.mixing_coefficients @ model.means.double()
    given = torch.where(mask, flat - origin, 0.0)
    weight = mask.double()
    parts = []
    # The outer products of the loadings' rows take the most memory.
    step = max(1, _CHUNK_BYTES // (8 * model.n_features * max(1, model.n_factors) ** 2))
    log_mixing = model.mixing_logits.double().log_softmax(0)
    for start in range(0, model.n_components, step):
        chosen = slice(start, start + step)
        noise, mean = model.noise_variance[chosen].double(), model.means[chosen].double() - origin
        loadings = model.factor_loadings[chosen].double()
        inverse = noise.reciprocal()
        scaled = loadings * inverse.unsqueeze(-1)
        outer = torch.einsum("kdi,kdj->dkij", scaled, loadings)
        size = (len(flat), len(mean), model.n_factors)
        identity = torch.eye(model.n_factors, dtype=torch.float64, device=flat.device)
        precision = (weight @ outer.flatten(1)).view(*size, model.n_factors) + identity
        linear = given @ scaled.permute(1, 0, 2).flatten(1)
        linear = (linear - weight @ (scaled * mean.unsqueeze(-1)).permute(1, 0, 2).flatten(1)).view(size)
        distance = given.square() @ inverse.T - 2 * given @ (mean * inverse).T + weight @ (mean.square() * inverse).T
        cholesky = torch.linalg.cholesky(precision)
        u = torch.linalg.solve_triangular(cholesky, linear.unsqueeze(-1), upper=False)
        log_det = weight @ noise.log().T + 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = weight.sum(1, keepdim=True) * math.log(2 * math.pi)
        log_joint = log_mixing[chosen] - 0.5 * (constant + log_det + distance - u.square().sum((-2, -1)))
        z = torch.linalg.solve_triangular(cholesky.mT, u, upper=True).squeeze(-1)
        parts.append((log_joint, z, cholesky))
    return Conditional(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


@torch.no_grad()
def inpaint(
    model: MFA,
    x: Tensor,
    observed: Tensor,
    *,
    mode: Mode = "map",
    noise: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fills in the hidden features of samples; the observed ones stay as they are.

    Args:
        model: the mixture.
        x: samples [n, ...]; hidden values are ignored, and may be NaN.
        observed: boolean, of the same shape, or of one sample's shape for all alike.
        mode: "map", the conditional mean in the most probable component; "mean", the mixture's exact conditional
            mean; "sample", a draw: of a component, and of its factors given what is observed.
        noise: in "sample", also draw the noise of the features.
        generator: for "sample".

    Returns:
        Completed samples, of the shape of x, in the model's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    flat, mask = _flat(model, x, observed)
    # z of all components at once, and their factorisations.
    per_sample = 8 * model.n_components * (model.n_factors + 1) ** 2 + 8 * model.n_features * (model.n_factors + 2)
    step = max(1, _CHUNK_BYTES // per_sample)
    out = torch.cat(
        [_fill(model, a, b, mode, noise, generator) for a, b in zip(flat.split(step), mask.split(step), strict=True)]
        or [flat]
    )
    return torch.where(mask, flat, out).to(model.means.dtype).view(x.shape)


def _fill(model: MFA, flat: Tensor, mask: Tensor, mode: Mode, noise: bool, generator: torch.Generator | None) -> Tensor:
    found = condition(model, flat, mask)
    loadings, means = model.factor_loadings, model.means
    if mode == "mean":
        r = found.responsibilities()
        mean = r @ means.double()
        for chosen in model.component_slices():
            weighted = (found.mean[:, chosen] * r[:, chosen, None]).flatten(1)
            mean += weighted @ loadings[chosen].double().mT.flatten(0, 1)
        return mean
    if mode == "map":
        component = found.log_joint.argmax(1)
    else:
        component = torch.multinomial(found.responsibilities(), 1, generator=generator).squeeze(1)
    rows = torch.arange(len(flat), device=flat.device)
    z = found.mean[rows, component]
    if mode == "sample":
        draw = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        factor = found.cholesky[rows, component].mT
        z = z + torch.linalg.solve_triangular(factor, draw.unsqueeze(-1), upper=True).squeeze(-1)
    filled = model.decode(z.to(means.dtype), component).double()
    if mode == "sample" and noise:
        draw = torch.randn(filled.shape, generator=generator, dtype=filled.dtype, device=z.device)
        filled = filled + draw * model.noise_variance[component].double().sqrt()
    return filled


def _flat(model: MFA, x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    if observed.dtype != torch.bool:
        raise ValueError("observed must be boolean: True where a feature is known")
    if observed.shape != x.shape:
        if observed.shape != x.shape[1:]:
            raise ValueError(f"observed has the shape {list(observed.shape)}, the samples {list(x.shape)}")
        observed = observed.expand(x.shape)
    flat, mask = x.flatten(1).double(), observed.flatten(1)
    if flat.shape[1] != model.n_features:
        raise ValueError(f"samples have {flat.shape[1]} features, the model has {model.n_features}")
    return flat.to(model.means.device), mask.to(model.means.device)
