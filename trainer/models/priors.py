"""Priors of codes: distributions that one can draw from, which is all that a sliced-Wasserstein autoencoder asks.

This file imports only torch and the standard library, so that it travels with a registered model as it is.

References:
    S. Kolouri et al., Sliced-Wasserstein Autoencoder, 2018 (figure 3: ring, uniform, circle and bowl).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

PLANE = ("ring", "disc", "square", "bowl")
KINDS = (*PLANE, "uniform", "gaussian", "mixture", "samples")


class Prior(nn.Module):
    """A distribution of codes z in K dimensions.

        ring       uniform on the annulus ½ <= |z| <= 1 of the plane
        disc       uniform on |z| <= 1 in the plane (the paper's circle)
        square     uniform on [-1, 1]²
        bowl       density 2 |z|² / π on |z| <= 1 in the plane: a paraboloid
        uniform    on [-1, 1]^K
        gaussian   N(0, I)
        mixture    Σ_t w_t N(m_t, s_t² I), of `size` components; `set_mixture` says which
        samples    one of `size` given points, each as likely; `set_samples` says which

    The last two hold their numbers as buffers: they travel with the weights, and no code of a user's does.

    Args:
        kind: one of the above.
        n_latent: K.
        size: of the last two: how many components or points.

    Raises:
        ValueError: an unknown kind (such as the dotted name of a function), or one that is not of K dimensions.
    """

    def __init__(self, kind: str, n_latent: int, size: int = 0) -> None:
        super().__init__()
        self.kind, self.n_latent, self.size = kind, n_latent, size
        if kind not in KINDS:
            raise ValueError(f"unknown prior {kind!r}: choose one of {', '.join(KINDS)}")
        if n_latent < 1 or (kind in PLANE and n_latent != 2):
            raise ValueError(f"the prior {kind} is of {'two' if kind in PLANE else 'some'} dimensions, not {n_latent}")
        if (size > 0) != (kind in ("mixture", "samples")):
            raise ValueError(f"size ({size}) is of the priors mixture and samples, which need one")
        self.points: Tensor
        self.spreads: Tensor
        self.weights: Tensor
        gaussians = size if kind == "mixture" else 0
        self.register_buffer("points", torch.zeros(size, n_latent), persistent=size > 0)
        self.register_buffer("spreads", torch.ones(gaussians), persistent=gaussians > 0)
        self.register_buffer("weights", torch.full((gaussians,), 1 / max(1, gaussians)), persistent=gaussians > 0)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments beside K, as plain values."""
        return {"kind": self.kind, "size": self.size}

    @torch.no_grad()
    def set_samples(self, points: Tensor) -> None:
        """The points [size, K] of the prior `samples`."""
        self.points.copy_(points)

    @torch.no_grad()
    def set_mixture(self, means: Tensor, spreads: Tensor, weights: Tensor) -> None:
        """Means [size, K], standard deviations [size] and weights [size] (made to sum to one) of a mixture."""
        self.points.copy_(means)
        self.spreads.copy_(spreads)
        self.weights.copy_(weights / weights.sum())

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws n codes [n, K]."""
        kind, k = self.kind, self.n_latent
        options: Any = {"generator": generator, "dtype": self.points.dtype, "device": self.points.device}
        if kind == "gaussian":
            return torch.randn(n, k, **options)
        if kind in ("uniform", "square"):
            return 2 * torch.rand(n, k, **options) - 1
        if kind == "samples":
            rows = torch.randint(self.size, (n,), generator=generator, device=self.points.device)
            return self.points[rows]
        if kind == "mixture":
            rows = torch.multinomial(self.weights, max(1, n), replacement=True, generator=generator)[:n]
            return self.points[rows] + self.spreads[rows, None] * torch.randn(n, k, **options)
        share, angle = torch.rand(2, n, **options)  # of the mass within the radius
        radius = {"ring": (0.25 + 0.75 * share).sqrt(), "disc": share.sqrt(), "bowl": share.sqrt().sqrt()}[kind]
        return radius[:, None] * torch.stack([(2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()], 1)
