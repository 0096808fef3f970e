"""A generator whose noise is a mixture of Gaussians: samples of one Gaussian, and ways from one to another.

This file imports only torch, the standard library and its neighbours: with these it travels in a registered model.

References:
    S. Gurumurthy, R. K. Sarvadevabhatla, R. V. Babu, DeLiGAN, CVPR 2017 (learnt means and deviations, equal weights).
    W. Huang, R. Y. D. Xu, S. Jiang, X. Liang, I. Oppermann, GAN-based Gaussian Mixture Model Responsibility Learning,
    ICPR 2020 (interpolation at fixed ε).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.models.gan import Generator

Prior = Literal["learnt", "unit", "fixed"]


class LatentPrior(nn.Module):
    """p(z) = Σ_k π_k N(z; μ_k, diag σ_k²) in d dimensions.

    The means start as draws of N(0, spread² I), the deviations at one. The `shares` π are equal, unless a training
    that weighs the Gaussians by data keeps them.

    Args:
        n_components: K.
        n_latent: d.
        spread: standard deviation of the starting means, per dimension.
        learns: "learnt", means and deviations; "unit", means alone, all deviations one; "fixed", nothing.
    """

    def __init__(self, n_components: int, n_latent: int, spread: float, learns: Prior) -> None:
        super().__init__()
        means, logs = spread * torch.randn(n_components, n_latent), torch.zeros(n_components, n_latent)
        self.means: Tensor
        self.log_deviations: Tensor
        self.shares: Tensor
        self.register_buffer("shares", torch.full((n_components,), 1 / n_components))
        for name, value, is_learnt in (
            ("means", means, learns != "fixed"),
            ("log_deviations", logs, learns == "learnt"),
        ):
            if is_learnt:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Models of earlier versions have no shares: theirs are equal.
        state_dict.setdefault(f"{prefix}shares", torch.full_like(self.shares, 1 / len(self.shares)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def place(self, noise: Tensor, component: Tensor) -> Tensor:
        """z = σ_k ε + μ_k, [..., d], for noise ε [..., d] and each sample's component k [...]."""
        return self.means[component] + self.log_deviations.exp()[component] * noise

    def log_posterior(self, z: Tensor) -> Tensor:
        """log p(k | z), [..., K], for z [..., d] with equal weights (eqs. 2, 3 of Huang et al.)."""
        precision = (-2 * self.log_deviations).exp()
        square = (
            z.square() @ precision.T - 2 * z @ (self.means * precision).T + (self.means.square() * precision).sum(1)
        )
        return (-square / 2 - self.log_deviations.sum(1)).log_softmax(-1)

    def forward(self, noise: Tensor, component: Tensor) -> tuple[Tensor, Tensor]:
        """(z of `place`, log p(· | z)), [..., d] and [..., K], for noise ε [..., d] and components k [...]."""
        z = self.place(noise, component)
        return z, self.log_posterior(z)


class LatentMixture(nn.Module):
    """x = G(z), z ~ Σ_k π_k N(μ_k, diag σ_k²), with G a `trainer.models.gan.Generator`.

    Args:
        shape, n_latent, n_hidden, n_layers, width, bounded: of the generator.
        n_components: K.
        spread, prior: of the `LatentPrior`, where `prior` is its `learns`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        n_components: int,
        n_latent: int = 32,
        n_hidden: int = 128,
        n_layers: int = 3,
        width: int = 32,
        bounded: bool = False,
        spread: float = 1.0,
        prior: Prior = "learnt",
    ) -> None:
        super().__init__()
        if n_components < 1 or not spread >= 0 or prior not in ("learnt", "unit", "fixed"):
            raise ValueError("a latent mixture needs n_components >= 1, spread >= 0, and a prior: learnt, unit, fixed")
        self.n_components, self.spread, self.learns = n_components, float(spread), prior
        self.generator = Generator(shape, n_latent, n_hidden, n_layers, width, bounded)
        self.prior = LatentPrior(n_components, n_latent, self.spread, prior)
        self.shape, self.n_features, self.n_latent = self.generator.shape, self.generator.n_features, n_latent

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        mixture = {"n_components": self.n_components, "spread": self.spread, "prior": self.learns}
        return {**self.generator.config, **mixture}

    @property
    def bounded(self) -> bool:
        """Whether values lie in [0, 1]."""
        return self.generator.bounded

    @property
    def offset(self) -> Tensor:
        """What is added to the network's values: per channel of images, else per feature."""
        return self.generator.offset

    @property
    def scale(self) -> Tensor:
        """What the network's values are multiplied by: per channel of images, else per feature."""
        return self.generator.scale

    def set_scale(self, x: Tensor) -> None:
        """Takes mean and standard deviation of samples x [n, ...]; bounded values keep their range."""
        self.generator.set_scale(x)

    def decode(self, z: Tensor) -> Tensor:
        """The samples of latent points z [n, n_latent], [n, n_features]."""
        return self.generator.decode(z)

    def forward(self, x: None, n: int) -> tuple[None, Tensor, Tensor, Tensor]:
        """(no log p, a log-prior of zero [], n samples [n, n_features], components [n]), the call that engines wrap.

        Components and noise are of torch's default generator.
        """
        component, noise = self._draw(n)
        samples = self.decode(self.prior.place(noise, component))
        return None, samples.new_zeros(()), samples, component

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, *, component: int | None = None) -> Tensor:
        """Draws n samples [n, n_features], of all Gaussians by their shares or of one `component`."""
        chosen, noise = self._draw(n, generator)
        if component is not None:
            chosen = torch.full_like(chosen, range(self.n_components)[component])
        return self.decode(self.prior.place(noise, chosen))

    @torch.no_grad()
    def interpolate(self, weights: Tensor, noise: Tensor) -> Tensor:
        """G(Σ_k w_k (σ_k ε + μ_k)), [n, n_features], for weights w [n, K] and one noise ε [n_latent] for all."""
        z = self.prior.place(noise, torch.arange(self.n_components, device=noise.device))
        return self.decode(weights @ z)

    def _draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Components [n] and noise [n, n_latent]."""
        device, dtype = self.offset.device, self.offset.dtype
        component = torch.multinomial(self.prior.shares, n, replacement=True, generator=generator)
        return component, torch.randn(n, self.n_latent, generator=generator, dtype=dtype, device=device)


def barycentric(corners: Sequence[int], n_components: int, steps: int) -> Tensor:
    """Weights [n, K] of evenly spaced points between Gaussians, for `LatentMixture.interpolate`.

    Two corners give `steps` points from the first to the second; three a triangle of `steps` rows of 1, 2, ... points,
    the first corner on top, n = steps (steps + 1) / 2.

    Raises:
        ValueError: another number of corners, or fewer than two steps.
    """
    if len(corners) not in (2, 3) or steps < 2:
        raise ValueError("interpolation needs two or three Gaussians and two steps or more")
    last = steps - 1
    points: list[tuple[int, ...]]
    if len(corners) == 2:
        points = [(last - i, i) for i in range(steps)]
    else:
        points = [(last - row, row - i, i) for row in range(steps) for i in range(row + 1)]
    weights = torch.zeros(len(points), n_components)
    for column, corner in enumerate(corners):  # a corner named twice gets both weights
        weights[:, corner] += torch.tensor([point[column] / last for point in points])
    return weights


MODEL = LatentMixture
