"""A small classifier: a convolutional network for images, a multi-layer perceptron for other samples.

It imports only torch, the standard library and its neighbours, so that it travels with a registered model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.scaling import mean_and_deviation

_SMALLEST_IMAGE = 8
_MOST_STAGES = 5
_GRID = 4  # rows and columns that images are pooled to in the end


class Classifier(nn.Module):
    """p(class | x) for samples x of one shape.

    Images (of at least 8x8 pixels) go through stages of convolution, group normalisation, ReLU and pooling, so many
    that about 4x4 places are left, then one hidden layer; other samples through two hidden layers. Nothing in it
    depends on the other samples of a batch or on chance, so that workers that share a batch train the same network.

    Args:
        shape: of a sample: [height, width], [height, width, channels], or [n_features].
        n_classes: number of classes C.
        width: channels of the first stage; each stage doubles them, four times at most.
        n_hidden: units of the hidden layer whose activations are the features.
    """

    def __init__(self, shape: Sequence[int], n_classes: int, width: int = 32, n_hidden: int = 128) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.n_classes, self.width, self.n_hidden = n_classes, width, n_hidden
        if not self.shape or min(*self.shape, width, n_hidden) < 1 or n_classes < 2:
            raise ValueError("a classifier needs a shape, n_classes >= 2, width >= 1 and n_hidden >= 1")
        self.n_features = math.prod(self.shape)
        self.is_image = len(self.shape) in (2, 3) and min(self.shape[:2]) >= _SMALLEST_IMAGE
        columns = (self.shape[2] if len(self.shape) == 3 else 1) if self.is_image else self.n_features
        self.offset: Tensor
        self.scale: Tensor
        self.register_buffer("offset", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))
        self.body = _convolutions(self.shape, columns, width, n_hidden) if self.is_image else _layers(columns, n_hidden)
        self.head = nn.Linear(n_hidden, n_classes)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "shape": list(self.shape),
            "n_classes": self.n_classes,
            "width": self.width,
            "n_hidden": self.n_hidden,
        }

    @torch.no_grad()
    def set_scale(self, x: Tensor) -> None:
        """Takes mean and standard deviation of samples x [n, ...] to bring all inputs to zero mean and unit variance.

        Images: one pair per channel; others: one per feature, and 1 where a feature is constant.
        """
        mean, deviation = mean_and_deviation(x, len(self.offset))
        self.offset.copy_(mean)
        self.scale.copy_(deviation)

    def features(self, x: Tensor) -> Tensor:
        """Activations of the last hidden layer, [batch, n_hidden], for x [batch, ...].

        Raises:
            ValueError: x does not have n_features values per sample.
        """
        return self.body(self._inputs(x))

    def activations(self, x: Tensor) -> list[Tensor]:
        """Activations of every hidden layer, as [batch, channels, height, width] or [batch, n_hidden].

        Raises:
            ValueError: as `features`.
        """
        h, found = self._inputs(x), []
        for layer in self.body:
            h = layer(h)
            if isinstance(layer, nn.ReLU):
                found.append(h)
        return found

    def _inputs(self, x: Tensor) -> Tensor:
        """Samples x [batch, ...] as the first layer takes them."""
        flat = x.flatten(1).to(self.head.weight.dtype)
        if flat.shape[1] != self.n_features:
            raise ValueError(f"samples have {flat.shape[1]} features, the model has {self.n_features}")
        depth = len(self.offset)
        columns = (flat.unflatten(1, (self.n_features // depth, depth)) - self.offset) / self.scale
        if not self.is_image:
            return columns.flatten(1)
        return columns.unflatten(1, self.shape[:2]).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, n_classes] for x [batch, ...]."""
        return self.head(self.features(x))

    def probabilities(self, x: Tensor) -> Tensor:
        """p(class | x), [batch, n_classes]."""
        return self(x).softmax(1)


def _convolutions(shape: tuple[int, ...], channels: int, width: int, n_hidden: int) -> nn.Sequential:
    stages = min(_MOST_STAGES, int(math.log2(min(shape[:2]) / _GRID)))
    layers: list[nn.Module] = []
    for stage in range(stages + 1):
        wide = width * 2 ** min(stage, 3)
        layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), _Norm(wide), nn.ReLU()]
        if stage < stages:
            layers.append(nn.MaxPool2d(2))
        channels = wide
    layers += [nn.AdaptiveAvgPool2d(_GRID), nn.Flatten(), nn.Linear(channels * _GRID**2, n_hidden), nn.ReLU()]
    return nn.Sequential(*layers)


class _Norm(nn.GroupNorm):
    """Group normalisation in groups of eight channels, or all in one where eight do not divide them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels // 8 if channels % 8 == 0 else 1, channels)


def _layers(n_features: int, n_hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_features, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_hidden), nn.ReLU())


MODEL = Classifier
