"""A mixture of factor analysers whose samples a U-Net gives details: sharp images that keep the mixture's coverage.

This file imports only torch, the standard library and its neighbours: with these it travels in a registered model.

References:
    E. Richardson, Y. Weiss, On GANs and GMMs, NeurIPS 2018 (§ "Generating sharp images", supplement §2.3).
    P. Isola, J.-Y. Zhu, T. Zhou, A. A. Efros, Image-to-Image Translation with Conditional Adversarial Networks, CVPR
    2017 (U-Net and PatchGAN).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.models.gan import halvings
from trainer.models.mfa import MFA

_MOST_DOUBLINGS = 3  # of the channels
_SLOPE = 0.2


class Pix2Pix(nn.Module):
    """x = U(y), with y a sample of a mixture of factor analysers without its noise (μ + A z), pixels in [0, 1].

    The mixture stands still: its tensors are buffers. Normalisation is by groups, and there is no dropout, so that an
    image with details is a function of the one without; all chance is the mixture's.

    Args:
        shape: of an image, [height, width] or [height, width, channels], whose sides can be halved to 4 to 7 places.
        n_components, n_factors, noise_floor, noise: of the `MFA`.
        width: channels of the U-Net's first stage; each stage has twice as many, eight times at most.
    """

    def __init__(
        self,
        shape: Sequence[int],
        n_components: int,
        n_factors: int,
        noise_floor: float = 1e-6,
        noise: Literal["diagonal", "isotropic"] = "diagonal",
        width: int = 32,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        if not halvings(self.shape) or width < 1:
            raise ValueError("details need width >= 1 and images whose sides can be halved to 4 to 7 places")
        self.n_features, self.n_components, self.width = math.prod(self.shape), n_components, width
        self.mixture = MFA(n_components, self.n_features, n_factors, noise_floor, noise)
        for name, value in [*self.mixture.named_parameters()]:
            delattr(self.mixture, name)
            self.mixture.register_buffer(name, value.detach())
        channels = self.shape[2] if len(self.shape) == 3 else 1
        self.network = UNet(channels, width, halvings(self.shape))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        mixture = self.mixture.config
        del mixture["n_features"]
        return {"shape": list(self.shape), **mixture, "width": self.width}

    @property
    def mixing_coefficients(self) -> Tensor:
        """The mixture's mixing coefficients, [n_components] float64."""
        return self.mixture.mixing_coefficients

    def forward(self, y: Tensor) -> Tensor:
        """Images y [n, ...] with details, [n, n_features]."""
        images = y.unflatten(1, (*self.shape[:2], -1)) if y.ndim == 2 else y.reshape(len(y), *self.shape[:2], -1)
        out = self.network(2 * images.permute(0, 3, 1, 2) - 1)
        return (out.permute(0, 2, 3, 1).flatten(1) + 1) / 2

    @torch.no_grad()
    def plain(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n samples of the mixture, without noise and without details, [n, n_features]."""
        return self.mixture.sample(n, generator, noise=False)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws n samples [n, n_features]: those of `plain`, with details."""
        return self(self.plain(n, generator))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mixture's reconstruction of images x [n, ...], with details, [n, n_features]."""
        return self(self.mixture.reconstruct(x))

    def responsibilities(self, x: Tensor) -> Tensor:
        """The mixture's p(k | x), [n, n_components]."""
        return self.mixture.responsibilities(x)


class UNet(nn.Module):
    """Images [n, channels, h, w] in [-1, 1] to such images: strided convolutions down, transposed ones up, and skips.

    Each stage on the way up also sees the one of its size on the way down; the first and last are of full size.
    """

    def __init__(self, channels: int, width: int, stages: int) -> None:
        super().__init__()
        wide = [width << min(stage, _MOST_DOUBLINGS) for stage in range(stages + 1)]
        self.first = nn.Conv2d(channels, wide[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(nn.LeakyReLU(_SLOPE), nn.Conv2d(a, b, 4, stride=2, padding=1), _norm(b))
            for a, b in pairwise(wide)
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                # But for the innermost, a stage sees what comes from below beside the one of that size.
                nn.ConvTranspose2d(wide[i + 1] * (1 if i + 1 == stages else 2), wide[i], 4, stride=2, padding=1),
                _norm(wide[i]),
            )
            for i in reversed(range(stages))
        )
        self.last = nn.Sequential(nn.ReLU(), nn.Conv2d(2 * wide[0], channels, 3, padding=1), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        seen = [self.first(images)]
        for stage in self.down:
            seen.append(stage(seen[-1]))
        h = seen.pop()
        for stage in self.up:
            h = torch.cat([stage(h), seen.pop()], 1)
        return self.last(h)


class PatchCritic(nn.Module):
    """Logits of whether patches of an image are real, given the image without details (PatchGAN): [n, patches].

    Args:
        shape: of an image, as the generator's.
        width: channels of the first convolution; each stage has twice as many.
        stages: strided convolutions; two see patches of 18 x 18 pixels, three of 38 x 38.
    """

    def __init__(self, shape: Sequence[int], width: int = 32, stages: int = 2) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        if not 1 <= stages <= halvings(self.shape) or width < 1:
            raise ValueError(f"patches of {list(self.shape)} need width >= 1 and 1 to {halvings(self.shape)} stages")
        channels = 2 * (self.shape[2] if len(self.shape) == 3 else 1)
        layers: list[nn.Module] = []
        for stage in range(stages):
            wide = width << min(stage, _MOST_DOUBLINGS)
            layers += [nn.Conv2d(channels, wide, 4, stride=2, padding=1), *([_norm(wide)] if stage else [])]
            layers.append(nn.LeakyReLU(_SLOPE))
            channels = wide
        self.network = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, given: Tensor, x: Tensor) -> Tensor:
        """For images given [n, n_features] and x [n, n_features], pixels in [0, 1]."""
        columns = [part.unflatten(1, (*self.shape[:2], -1)) for part in (given, x)]
        return self.network(2 * torch.cat(columns, 3).permute(0, 3, 1, 2) - 1).flatten(1)


def _norm(channels: int) -> nn.GroupNorm:
    """Group normalisation in groups of eight channels, or all in one where eight do not divide them."""
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


MODEL = Pix2Pix
