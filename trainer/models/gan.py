"""Generators without a density, and the critics that train generators of any kind.

Networks for images follow DCGAN's plan (strided and transposed 4x4 convolutions, no pooling), with group in place of
batch normalisation: no sample depends on the others of its batch, so that workers that share a batch train one
network, the gradient penalty is one of each sample, and a drawn image is a function of its own noise.
It imports only torch, the standard library and its neighbours, so that it travels with a registered model as it is.

References:
    A. Radford, L. Metz, S. Chintala, Unsupervised Representation Learning with DCGAN, ICLR 2016.
    I. Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017 (§4: no batch normalisation in critics).
    W. Gong, Wasserstein Generative Adversarial Network, MPhil thesis, Cambridge, 2017 (§4.3: mixture of critics).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.scaling import mean_and_deviation

_SMALLEST_GRID = 4
_MOST_DOUBLINGS = 3  # of the channels


class Generator(nn.Module):
    """x = offset + scale · g(z), z ~ N(0, I): an implicit model of samples of one shape.

    Images whose sides can be halved are grown from a grid of about 4x4 places by transposed convolutions; other
    samples come from a multi-layer perceptron. Bounded values go through tanh, and offset = scale = ½ puts them into
    [0, 1]; others are brought to the data's mean and standard deviation by `set_scale`.

    Args:
        shape: of a sample: [height, width], [height, width, channels], or [n_features].
        n_latent: dimension of the noise z.
        n_hidden: units of a hidden layer (samples that are no images).
        n_layers: hidden layers (samples that are no images).
        width: images: channels of the last hidden stage; each stage before it has twice as many, eight times at most.
        bounded: whether values lie in [0, 1].
    """

    def __init__(
        self,
        shape: Sequence[int],
        n_latent: int = 32,
        n_hidden: int = 128,
        n_layers: int = 3,
        width: int = 32,
        bounded: bool = False,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.n_latent, self.n_hidden, self.n_layers, self.width = n_latent, n_hidden, n_layers, width
        self.bounded = bool(bounded)
        if not self.shape or min(*self.shape, n_latent, n_hidden, width) < 1 or n_layers < 0:
            raise ValueError("a generator needs a shape, n_latent, n_hidden and width >= 1, and n_layers >= 0")
        self.n_features = math.prod(self.shape)
        self.halvings, columns = halvings(self.shape), _columns(self.shape)
        self.offset: Tensor
        self.scale: Tensor
        self.register_buffer("offset", torch.full((columns,), 0.5 if bounded else 0.0))
        self.register_buffer("scale", torch.full((columns,), 0.5 if bounded else 1.0))
        self.body = self._convolutions(columns) if self.halvings else self._layers()

    def _layers(self) -> nn.Sequential:
        sizes = [self.n_latent, *[self.n_hidden] * self.n_layers]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(sizes[-1], self.n_features))

    def _convolutions(self, channels: int) -> nn.Sequential:
        grid = [size >> self.halvings for size in self.shape[:2]]
        wide = [self.width << min(stage, _MOST_DOUBLINGS) for stage in reversed(range(self.halvings))]
        layers: list[nn.Module] = [
            nn.Linear(self.n_latent, wide[0] * math.prod(grid)),
            nn.Unflatten(1, (wide[0], *grid)),
        ]
        for narrow, wider in zip([*wide[1:], channels], wide):
            layers += [_norm(wider), nn.ReLU(), nn.ConvTranspose2d(wider, narrow, 4, stride=2, padding=1)]
        return nn.Sequential(*layers)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "shape": list(self.shape),
            "n_latent": self.n_latent,
            "n_hidden": self.n_hidden,
            "n_layers": self.n_layers,
            "width": self.width,
            "bounded": self.bounded,
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

    def decode(self, z: Tensor) -> Tensor:
        """The samples of noise z [n, n_latent], [n, n_features]."""
        out = self.body(z)
        columns = out.movedim(1, -1) if self.halvings else out
        columns = columns.flatten(1).unflatten(1, (-1, len(self.offset)))
        return (self.offset + self.scale * (columns.tanh() if self.bounded else columns)).flatten(1)

    def forward(self, x: None, n: int) -> tuple[None, Tensor, Tensor, Tensor]:
        """(no log p, a log-prior of zero [], n samples [n, n_features], components [n]), the call that engines wrap.

        The noise is of torch's default generator. There is one component, number 0.
        """
        samples = self.decode(self._noise(n))
        return None, samples.new_zeros(()), samples, torch.zeros(n, dtype=torch.int64, device=samples.device)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws n samples [n, n_features]."""
        return self.decode(self._noise(n, generator))

    def _noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(n, self.n_latent, generator=generator, dtype=self.offset.dtype, device=self.offset.device)


class Encoder(nn.Module):
    """Features of samples x: hidden layers after, for images whose sides can be halved, strided convolutions.

    Args:
        shape: of a sample, as the generator's.
        n_hidden: units of a hidden layer.
        n_layers: hidden layers with ReLU.
        width: images: channels of the first convolution; each stage has twice as many, eight times at most.
    """

    def __init__(self, shape: Sequence[int], n_hidden: int = 100, n_layers: int = 4, width: int = 32) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        if not self.shape or min(*self.shape, n_hidden, width) < 1 or n_layers < 0:
            raise ValueError("an encoder needs a shape, n_hidden and width >= 1, and n_layers >= 0")
        self.n_features, self.n_hidden, self.width = math.prod(self.shape), n_hidden, width
        self.halvings, columns = halvings(self.shape), _columns(self.shape)
        self.offset: Tensor
        self.scale: Tensor
        self.register_buffer("offset", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))
        trunk: list[nn.Module] = []
        size = self.n_features
        if self.halvings:
            trunk, size = self._convolutions(columns)
        sizes = [size, *[n_hidden] * n_layers]
        for pair in pairwise(sizes):
            trunk += [nn.Linear(*pair), nn.ReLU()]
        self.trunk = nn.Sequential(*trunk)
        self.n_outputs = sizes[-1]

    def _convolutions(self, channels: int) -> tuple[list[nn.Module], int]:
        layers: list[nn.Module] = []
        for stage in range(self.halvings):
            wide = self.width << min(stage, _MOST_DOUBLINGS)
            layers += [nn.Conv2d(channels, wide, 4, stride=2, padding=1), *([_norm(wide)] if stage else [])]
            layers.append(nn.LeakyReLU(0.2))
            channels = wide
        return [*layers, nn.Flatten()], channels * math.prod(size >> self.halvings for size in self.shape[:2])

    @torch.no_grad()
    def set_scale(self, offset: Tensor, scale: Tensor) -> None:
        """Makes the network see (x - offset) / scale, for values per channel of images, else per feature."""
        self.offset.copy_(offset)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """The features [batch, n_outputs] of x [batch, ...].

        Raises:
            ValueError: x does not have n_features values per sample.
        """
        flat = x.flatten(1)
        if flat.shape[1] != self.n_features:
            raise ValueError(f"samples have {flat.shape[1]} features, the network has {self.n_features}")
        h = (flat.unflatten(1, (-1, len(self.offset))) - self.offset) / self.scale
        return self.trunk(h.unflatten(1, self.shape[:2]).permute(0, 3, 1, 2) if self.halvings else h.flatten(1))


class Critic(Encoder):
    """f_1(x), ..., f_T(x): one critic, a mixture of T with shared first layers, or an embedding in T dimensions.

    The T networks are batched matrix products. Images whose sides can be halved first go through convolutions, which
    all share; then come `n_layers` hidden layers with ReLU, of which the first `n_shared` are shared, too.

    Args:
        shape: of a sample, as the generator's.
        n_critics: T.
        n_hidden: units of a hidden layer.
        n_layers: hidden layers.
        n_shared: how many of them all critics share.
        width: images: channels of the first convolution; each stage has twice as many, eight times at most.
    """

    def __init__(
        self,
        shape: Sequence[int],
        n_critics: int = 1,
        n_hidden: int = 100,
        n_layers: int = 4,
        n_shared: int = 0,
        width: int = 32,
    ) -> None:
        if not shape or min(*shape, n_critics, n_hidden, width) < 1 or not 0 <= n_shared <= n_layers:
            raise ValueError(
                "a critic needs a shape, n_critics, n_hidden and width >= 1, and n_shared from 0 to n_layers"
            )
        super().__init__(shape, n_hidden, n_shared, width)
        self.n_critics, self.n_layers, self.n_shared = n_critics, n_layers, n_shared
        own = [self.n_outputs, *[n_hidden] * (n_layers - n_shared), 1]
        self.heads = nn.ModuleList(_BatchedLinear(n_critics, *pair) for pair in pairwise(own))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "shape": list(self.shape),
            "n_critics": self.n_critics,
            "n_hidden": self.n_hidden,
            "n_layers": self.n_layers,
            "n_shared": self.n_shared,
            "width": self.width,
        }

    def forward(self, x: Tensor) -> Tensor:
        """The critics' values [batch, n_critics] for x [batch, ...].

        Raises:
            ValueError: x does not have n_features values per sample.
        """
        h = super().forward(x).expand(self.n_critics, -1, -1)
        for number, layer in enumerate(self.heads):
            h = layer(h.relu() if number else h)
        return h.squeeze(2).T


class _BatchedLinear(nn.Module):
    """T linear layers in one product: [T, batch, n_in] to [T, batch, n_out], each started as torch's own."""

    def __init__(self, count: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(count, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, n_out).uniform_(-bound, bound))

    def forward(self, h: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, h, self.weight)


def halvings(shape: Sequence[int]) -> int:
    """How often the sides of an image of this shape halve down to 4 to 7 places; 0 for what is taken as a vector."""
    if len(shape) not in (2, 3):
        return 0
    count, (height, width) = 0, shape[:2]
    while height % 2 == width % 2 == 0 and min(height, width) >= 2 * _SMALLEST_GRID:
        count, height, width = count + 1, height // 2, width // 2
    return count


def _columns(shape: Sequence[int]) -> int:
    """The channels of an image, or the features of a vector."""
    if halvings(shape):
        return shape[2] if len(shape) == 3 else 1
    return math.prod(shape)


def _norm(channels: int) -> nn.GroupNorm:
    """Group normalisation in groups of eight channels, or all in one where eight do not divide them."""
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


MODEL = Generator
