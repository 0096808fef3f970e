"""Coupling layers of normalising flows: T flows side by side, every layer one batched matrix product or convolution.

This file imports only torch, the standard library and its neighbours: with these it travels in a registered model.

References:
    L. Dinh, D. Krueger, Y. Bengio, NICE: Non-linear Independent Components Estimation, 2014 (arXiv 1410.8516).
    L. Dinh, J. Sohl-Dickstein, S. Bengio, Density estimation using Real NVP, ICLR 2017 (arXiv 1605.08803).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.precision import reduced_products

# Bound of a layer's log-scales: an affine layer stretches by at most a thousand, or one step far out would overflow.
_LARGEST_LOG_SCALE = math.log(1000)

Network = Callable[[int, int], nn.Module]


class MLP(nn.Module):
    """T perceptrons: [T, batch, n_in] -> [T, batch, n_out], rectified linear units, the last layer zero at the start.

    Args:
        n_components: T.
        n_in, n_out: numbers of features.
        width: units of a hidden layer.
        n_layers: hidden layers.
        residual: add to each hidden layer but the first what enters it.
        start: standard deviation of the last layer's weights at the start, over that of the other layers'.
    """

    def __init__(
        self, n_components: int, n_in: int, n_out: int, width: int, n_layers: int, residual: bool, start: float = 0.0
    ) -> None:
        super().__init__()
        self.residual = residual
        sizes = [n_in, *[width] * n_layers, n_out]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            gain = start if i == n_layers else 1.0
            weight = torch.randn(n_components, fan_in, fan_out) * (gain * math.sqrt(2 / fan_in))
            bias = (2 * torch.rand(n_components, 1, fan_out) - 1) * (gain / math.sqrt(fan_in))
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            out = torch.baddbmm(bias, x, weight)
            if i == last:
                return out
            out = out.relu_()
            x = x + out if self.residual and i else out
        return x


class ConvNet(nn.Module):
    """T residual convolutional networks by grouped convolutions: [batch, T, n_in, h, w] -> [batch, T, n_out, h, w].

    A 3x3 convolution, `n_layers` blocks x + conv1x1(relu(conv3x3(relu(x)))), and a 3x3 convolution that is zero at the
    start. Without batch normalisation: a sample's density depends on no other sample.
    """

    def __init__(self, n_components: int, n_in: int, n_out: int, width: int, n_layers: int, start: float = 0.0) -> None:
        super().__init__()
        t = self.n_components = n_components

        def convolution(inputs: int, outputs: int, size: int, gain: float) -> nn.Conv2d:
            layer = nn.Conv2d(t * inputs, t * outputs, size, padding=size // 2, groups=t)
            nn.init.normal_(layer.weight, std=gain * math.sqrt(2 / (inputs * size**2)))
            # Typed as optional: there is one, as none was refused above.
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            return layer

        self.first = convolution(n_in, width, 3, 1.0)
        # Each block starts small, so that the sum over blocks stays of the size of its input.
        self.wide = nn.ModuleList(convolution(width, width, 3, 1.0) for _ in range(n_layers))
        self.narrow = nn.ModuleList(convolution(width, width, 1, 1 / math.sqrt(n_layers)) for _ in range(n_layers))
        self.last = convolution(width, n_out, 3, start)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1, 2))
        for wide, narrow in zip(self.wide, self.narrow):
            h = h + narrow(F.relu(wide(F.relu(h))))
        return self.last(F.relu(h)).unflatten(1, (self.n_components, -1))


class Coupling(nn.Module):
    """b -> b + m(a), or b -> b exp(s(a)) + m(a) where it is affine (NICE eq. 4-5; Real NVP eq. 4).

    Args:
        network: made for (number of inputs, number of outputs); features are its output's axis `axis`.
        n_given, n_changed: features of a and b.
        affine: whether b is scaled.
        axis: of the features.
        reduced: compute the network's matrix products in training mode by `reduced_products`; never scales and sums.
    """

    def __init__(
        self, network: Network, n_given: int, n_changed: int, affine: bool, axis: int, reduced: bool = False
    ) -> None:
        super().__init__()
        self.affine, self.axis, self.reduced = affine, axis, reduced
        self.network = network(n_given, n_changed * (2 if affine else 1))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
        """The new b, and the log-scale of each of its features (None for zero)."""
        shift, log_scale = self._parts(a)
        return (b + shift, None) if log_scale is None else (b * log_scale.exp() + shift, log_scale)

    def inverse(self, a: Tensor, b: Tensor) -> Tensor:
        """The old b."""
        shift, log_scale = self._parts(a)
        return b - shift if log_scale is None else (b - shift) * (-log_scale).exp()

    def _parts(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        with reduced_products(a.device.type, self.reduced and self.training):
            out = self.network(a)
        out = out.to(a.dtype)
        if not self.affine:
            return out, None
        shift, raw = out.chunk(2, self.axis)
        return shift, raw / (1 + raw.abs() / _LARGEST_LOG_SCALE)


class VectorFlow(nn.Module):
    """Couplings of the features of even number with those of odd number, each half in turn; [T, batch, d].

    A single feature has no partner: then there is no coupling, and the flow is the identity.

    Args:
        n_features: d.
        network: of a coupling; see `Coupling`.
        n_couplings: number of layers.
        affine, reduced: of a coupling.
    """

    def __init__(self, n_features: int, network: Network, n_couplings: int, affine: bool, reduced: bool) -> None:
        super().__init__()
        self.sizes = ((n_features + 1) // 2, n_features // 2)
        n_couplings = n_couplings if n_features > 1 else 0
        pairs = [self.sizes if i % 2 == 0 else self.sizes[::-1] for i in range(n_couplings)]
        self.layers = nn.ModuleList(Coupling(network, *pair, affine, -1, reduced) for pair in pairs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """z [T, batch, d], its halves one after the other, and log |det dz/dx| [T, batch]."""
        a, b = x[..., 0::2].contiguous(), x[..., 1::2].contiguous()
        log_det: Tensor | float = 0.0
        for layer in self.layers:
            b, log_scale = layer(a, b)
            log_det = log_det if log_scale is None else log_det + log_scale.sum(-1)
            a, b = b, a
        return torch.cat([a, b], -1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """x [T, batch, d]."""
        sizes = self.sizes if len(self.layers) % 2 == 0 else self.sizes[::-1]
        a, b = z.split(sizes, -1)
        for layer in reversed(self.layers):
            a, b = b, a
            b = cast(Coupling, layer).inverse(a, b)
        x = z.new_empty(z.shape)
        x[..., 0::2], x[..., 1::2] = a, b
        return x


class ImageFlow(nn.Module):
    """Convolutional couplings in two scales (Real NVP §3.4-3.6), for [T, batch, height * width * channels].

    At each scale the pixels of every 2x2 square become channels. Two of them, on a diagonal, are coupled with the
    other two, each in turn: that is the checkerboard mask, in a quarter of the work. Then the upper two with the lower
    two: the channel mask. Half of the channels then are done, the others are the image of the next scale.

    Args:
        shape: height, width, channels; height and width are even.
        network: of a coupling; see `Coupling`.
        n_couplings: layers of each mask at each scale.
        affine, reduced: of a coupling.

    Raises:
        ValueError: an odd height or width.
    """

    def __init__(
        self, shape: tuple[int, int, int], network: Network, n_couplings: int, affine: bool, reduced: bool
    ) -> None:
        super().__init__()
        if shape[0] % 2 or shape[1] % 2:
            raise ValueError(f"convolutional couplings need images of even height and width, not {shape[:2]}")
        self.shape, self.n_couplings = shape, n_couplings
        height, width, channels = shape
        self.n_scales = 2 if height % 4 == 0 and width % 4 == 0 else 1
        self.layers = nn.ModuleList(
            Coupling(network, pairs, pairs, affine, 2, reduced)
            for pairs in (2 * channels * 2**scale for scale in range(self.n_scales))
            for _ in range(2 * n_couplings)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """z [T, batch, d], the first scale's part first, and log |det dz/dx| [T, batch]."""
        image = x.unflatten(-1, self.shape).permute(1, 0, 4, 2, 3)
        done: list[Tensor] = []
        log_det: Tensor | float = 0.0
        for scale in range(self.n_scales):
            a, b = _squares(image)
            for mask in range(2):
                for layer in self._layers(scale, mask):
                    b, log_scale = layer(a, b)
                    log_det = log_det if log_scale is None else log_det + log_scale.sum((2, 3, 4)).T
                    a, b = b, a
                a, b = _exchanged(a, b)
            done.append(b)
            image = a
        done.append(image)
        return torch.cat([part.transpose(0, 1).flatten(2) for part in done], -1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """x [T, batch, d]."""
        height, width, channels = self.shape
        shapes = [(2 * channels * 2**s, height // 2 ** (s + 1), width // 2 ** (s + 1)) for s in range(self.n_scales)]
        parts = z.split([*(math.prod(shape) for shape in shapes), math.prod(shapes[-1])], -1)
        image = parts[-1].unflatten(-1, shapes[-1]).transpose(0, 1)
        for scale in reversed(range(self.n_scales)):
            a, b = image, parts[scale].unflatten(-1, shapes[scale]).transpose(0, 1)
            for mask in reversed(range(2)):
                a, b = _exchanged(a, b)
                for layer in reversed(self._layers(scale, mask)):
                    a, b = b, a
                    b = layer.inverse(a, b)
            image = _image(a, b)
        return image.permute(1, 0, 3, 4, 2).flatten(2)

    def _layers(self, scale: int, mask: int) -> list[Coupling]:
        first = (2 * scale + mask) * self.n_couplings
        return [cast(Coupling, self.layers[i]) for i in range(first, first + self.n_couplings)]


def _squares(image: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonals of all 2x2 squares, [.., 2 c, h / 2, w / 2] each, of an image [.., c, h, w]."""
    upper, lower = image[..., 0::2, :], image[..., 1::2, :]
    a = torch.cat([upper[..., 0::2], lower[..., 1::2]], 2)
    return a, torch.cat([upper[..., 1::2], lower[..., 0::2]], 2)


def _image(a: Tensor, b: Tensor) -> Tensor:
    """The inverse of `_squares`."""
    (upper_left, lower_right), (upper_right, lower_left) = a.chunk(2, 2), b.chunk(2, 2)
    upper = torch.stack([upper_left, upper_right], -1).flatten(-2)
    lower = torch.stack([lower_left, lower_right], -1).flatten(-2)
    return torch.stack([upper, lower], -2).flatten(-3, -2)


def _exchanged(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both first halves of the channels, and both second halves; its own inverse."""
    (first, second), (third, fourth) = a.chunk(2, 2), b.chunk(2, 2)
    return torch.cat([first, third], 2), torch.cat([second, fourth], 2)
