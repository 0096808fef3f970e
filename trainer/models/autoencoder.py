"""Autoencoders: an encoder φ, a decoder ψ, and the prior that the codes are shaped to.

The networks for images are those of Kolouri et al.'s supplement: at 28x28 pixels, a code of two dimensions and width 16
they have its 203,250 and 308,193 parameters; larger images get more stages.
This file imports only torch and its neighbours, so that it travels with a registered model as it is.

References:
    S. Kolouri et al., Sliced-Wasserstein Autoencoder, 2018 (supplement: networks).
    D. Kingma, M. Welling, Auto-Encoding Variational Bayes, 2013 (stochastic encoder).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.models.precision import reduced_products
from trainer.models.priors import Prior
from trainer.models.scaling import mean_and_deviation

_SMALLEST_IMAGE, _GRID = 8, 4
_MOST_DOUBLINGS = 3  # of the channels
_SLOPE = 0.2  # of the leaky rectifiers


class Coded(NamedTuple):
    """What training asks of a batch: codes [batch, K], raw outputs [decoded, n_features] of every stride-th of them,
    and the code's posterior, mean and log variance [batch, K] (zero where the encoder is deterministic)."""

    codes: Tensor
    raw: Tensor
    mean: Tensor
    log_variance: Tensor


class Autoencoder(nn.Module):
    """φ: samples of one shape to codes in K dimensions, and ψ back.

    Images (of at least 8x8 pixels) go through stages of two 3x3 convolutions with leaky rectifiers and average pooling
    down to about 4x4 places, one hidden layer and the code; the decoder mirrors that with nearest-neighbour upsampling.
    Other samples go through multi-layer perceptrons. Nothing depends on the other samples of a batch.

    Bounded values are decoded through a sigmoid into [0, 1]; others are brought to the data's mean and standard
    deviation by `set_scale`. In training, convolutions are computed in `precision`; codes, outputs and all that a
    model is used for after training are float32.

    Args:
        shape: of a sample: [height, width], [height, width, channels], or [n_features].
        n_latent: dimension K of the code.
        prior: `kind` and `size` of the codes' `Prior`.
        n_hidden: units of a hidden layer.
        n_layers: hidden layers of each perceptron (samples that are no images).
        width: images: channels of the first stage; each stage has twice as many, eight times at most.
        bounded: whether values lie in [0, 1].
        stochastic: whether the encoder gives a Gaussian, N(mean, exp(log variance)), as a VAE's does.
        precision: of training, float32 or bfloat16 (float32 where the machine has no instructions for it).
        channels_last: images: how they lie in memory, which decides speed and rounding alone.
    """

    def __init__(
        self,
        shape: Sequence[int],
        n_latent: int = 2,
        prior: Mapping[str, Any] | None = None,
        n_hidden: int = 128,
        n_layers: int = 2,
        width: int = 16,
        bounded: bool = False,
        stochastic: bool = False,
        precision: str = "float32",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        if not self.shape or min(*self.shape, n_latent, n_hidden, width) < 1 or n_layers < 0:
            raise ValueError("an autoencoder needs a shape, n_latent, n_hidden and width >= 1, and n_layers >= 0")
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"unknown precision {precision!r}: choose float32 or bfloat16")
        self.n_latent, self.n_hidden, self.n_layers, self.width = n_latent, n_hidden, n_layers, width
        self.bounded, self.stochastic = bool(bounded), bool(stochastic)
        self.precision, self.channels_last = precision, bool(channels_last)
        self.n_features = math.prod(self.shape)
        self.is_image = len(self.shape) in (2, 3) and min(self.shape[:2]) >= _SMALLEST_IMAGE
        columns = (self.shape[2] if len(self.shape) == 3 else 1) if self.is_image else self.n_features
        self.prior = Prior(n_latent=n_latent, **(prior or {"kind": "gaussian"}))
        self.offset: Tensor
        self.scale: Tensor
        self.register_buffer("offset", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))
        code = 2 * n_latent if stochastic else n_latent
        if self.is_image:
            self.encoder = _convolutions(self.shape, columns, width, n_hidden)
            self.code = nn.Linear(n_hidden, code)
            self.expand = nn.Linear(n_latent, n_hidden)
            self.decoder = _transposed(self.shape, columns, width, n_hidden)
        else:
            sizes = [n_hidden] * n_layers
            self.encoder = _layers([columns, *sizes])
            self.code = nn.Linear([columns, *sizes][-1], code)
            self.expand = nn.Linear(n_latent, [*sizes, columns][0])
            self.decoder = nn.Sequential(
                *(layer for pair in pairwise([*sizes, columns]) for layer in (nn.LeakyReLU(_SLOPE), nn.Linear(*pair)))
            )

        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Weights of constant signal through leaky rectifiers (He et al. 2015), of codes and outputs Glorot's; no bias.

        Torch's own start shrinks signals by more than half in each of the seventeen layers.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, a=_SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for layer in (self.code, self.expand, layers[-1]):
            nn.init.xavier_uniform_(layer.weight)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "shape": list(self.shape),
            "n_latent": self.n_latent,
            "prior": self.prior.config,
            "n_hidden": self.n_hidden,
            "n_layers": self.n_layers,
            "width": self.width,
            "bounded": self.bounded,
            "stochastic": self.stochastic,
            "precision": self.precision,
            "channels_last": self.channels_last,
        }

    @torch.no_grad()
    def set_scale(self, x: Tensor) -> None:
        """Takes mean and standard deviation of samples x [n, ...]; images: per channel, others: per feature.

        A feature that is constant gets a standard deviation of 1; bounded values keep their range.
        """
        if self.bounded:
            return
        mean, deviation = mean_and_deviation(x, len(self.offset))
        self.offset.copy_(mean)
        self.scale.copy_(deviation)

    def scaled(self, x: Tensor) -> Tensor:
        """x [batch, ...] as the networks see it and `Coded.raw` means it, [batch, n_features].

        Raises:
            ValueError: x does not have n_features values per sample.
        """
        flat = x.flatten(1).to(self.offset.dtype)
        if flat.shape[1] != self.n_features:
            raise ValueError(f"samples have {flat.shape[1]} features, the model has {self.n_features}")
        return (
            flat
            if self.bounded
            else ((flat.unflatten(1, (-1, len(self.offset))) - self.offset) / self.scale).flatten(1)
        )

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the code of x [batch, ...], [batch, K] each (zero where it is deterministic)."""
        h = self.scaled(x)
        if self.is_image:
            h = h.unflatten(1, (*self.shape[:2], -1)).permute(0, 3, 1, 2).contiguous(memory_format=self._layout)
        with self._faster():
            h = self.encoder(h)
        found = self.code(h.to(self.code.weight.dtype))
        if not self.stochastic:
            return found, torch.zeros_like(found)
        mean, log_variance = found.chunk(2, 1)
        return mean, log_variance

    def encode(self, x: Tensor) -> Tensor:
        """Codes [batch, K] of x [batch, ...]; of a stochastic encoder the means."""
        return self.posterior(x)[0]

    def raw(self, z: Tensor) -> Tensor:
        """The decoder's output [batch, n_features] for codes z [batch, K]: logits of bounded values, else scaled ones.

        Raises:
            ValueError: z does not have K columns.
        """
        if z.ndim != 2 or z.shape[1] != self.n_latent:
            raise ValueError(f"codes have the shape {list(z.shape)}: give [n, {self.n_latent}]")
        h = self.expand(z.to(self.expand.weight.dtype))
        with self._faster():
            h = self.decoder(h)
        if self.is_image:
            height, width = self.shape[:2]
            h = h[:, :, :height, :width].permute(0, 2, 3, 1).flatten(1)
        return h.to(self.offset.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Samples [batch, n_features] of codes z [batch, K].

        Raises:
            ValueError: z does not have K columns.
        """
        return self.outputs(self.raw(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """ψ(φ(x)), [batch, n_features], for x [batch, ...]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Decodes n draws of the prior, [n, n_features]."""
        return torch.cat([self.decode(z) for z in self.prior.sample(n, generator).split(1024)])

    def forward(self, x: Tensor, stride: int = 1) -> Coded:
        """All that training asks, in the call that engines wrap; the code's noise is of torch's default generator."""
        mean, log_variance = self.posterior(x)
        z = mean
        if self.stochastic:
            z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return Coded(z, self.raw(z[::stride]), mean, log_variance)

    def outputs(self, raw: Tensor) -> Tensor:
        """Samples [batch, n_features] that the decoder's raw output stands for."""
        if self.bounded:
            return raw.sigmoid()
        return (raw.unflatten(1, (-1, len(self.offset))) * self.scale + self.offset).flatten(1)

    def _faster(self) -> Any:
        return reduced_products(self.offset.device.type, self.training and self.precision == "bfloat16")

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def _stages(shape: tuple[int, ...], width: int) -> list[int]:
    """Channels of the encoder's stages, so many that the shorter side ends at four places or fewer."""
    count = max(1, math.ceil(math.log2(min(shape[:2]) / _GRID)))
    return [width << min(stage, _MOST_DOUBLINGS) for stage in range(count)]


def _convolutions(shape: tuple[int, ...], channels: int, width: int, n_hidden: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    wide = _stages(shape, width)
    for before, after in pairwise([channels, *wide]):
        layers += [*_convolution(before, after), *_convolution(after, after), nn.AvgPool2d(2, ceil_mode=True)]
    places = math.prod(-(-size >> len(wide)) for size in shape[:2])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(wide[-1] * places, n_hidden), nn.ReLU())


def _transposed(shape: tuple[int, ...], channels: int, width: int, n_hidden: int) -> nn.Sequential:
    """Mirrors `_convolutions`. Pooling rounds odd sides up, so that doubling overshoots: where by two places or more,
    a convolution without padding takes two off (as the supplement's does), and what remains is cut in the end."""
    encoded = _stages(shape, width)
    wide = [min(2 * each, encoded[-1]) for each in reversed(encoded)]
    grid = [-(-size >> len(wide)) for size in shape[:2]]
    layers: list[nn.Module] = [
        nn.Linear(n_hidden, wide[0] * math.prod(grid)),
        nn.ReLU(),
        nn.Unflatten(1, (wide[0], *grid)),
    ]
    for stage, (before, after) in enumerate(pairwise([wide[0], *wide]), 1):
        wanted = [-(-size >> (len(wide) - stage)) for size in shape[:2]]
        padding = (int(2 * grid[0] < wanted[0] + 2), int(2 * grid[1] < wanted[1] + 2))
        grid = [2 * size - 2 * (1 - each) for size, each in zip(grid, padding)]
        layers += [nn.Upsample(scale_factor=2), *_convolution(before, after, padding), *_convolution(after, after)]
    return nn.Sequential(*layers, nn.Conv2d(wide[-1], channels, 3, padding=1))


def _convolution(n_in: int, n_out: int, padding: tuple[int, int] = (1, 1)) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(n_in, n_out, 3, padding=padding), nn.LeakyReLU(_SLOPE)


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.LeakyReLU(_SLOPE))))


MODEL = Autoencoder
