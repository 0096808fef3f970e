"""A generator with a mixture of Gaussians for its noise, and a classifier that tells which Gaussian a sample is of.

This file imports only torch, the standard library and its neighbours: with these it travels in a registered model.

Reference:
    W. Huang, R. Y. D. Xu, S. Jiang, X. Liang, I. Oppermann, GAN-based Gaussian Mixture Model Responsibility Learning,
    ICPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trainer.models.gan import Critic, Encoder
from trainer.models.latent_mixture import LatentMixture, Prior


class ResponsibilityGAN(LatentMixture):
    """A latent mixture, and C(x) ≈ p(k | x): the responsibilities of its K Gaussians for any sample.

    Args:
        shape, n_components, n_latent, n_hidden, n_layers, width, bounded, spread, prior: of the `LatentMixture`.
        encoder_hidden, encoder_layers, encoder_width: of the classifier's `Encoder`; a linear layer follows.
        shared: whether the encoder stands apart, as one that a discriminator shares.
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
        encoder_hidden: int = 100,
        encoder_layers: int = 1,
        encoder_width: int = 32,
        shared: bool = False,
    ) -> None:
        super().__init__(shape, n_components, n_latent, n_hidden, n_layers, width, bounded, spread, prior)
        self.encoder_hidden, self.encoder_layers, self.encoder_width = encoder_hidden, encoder_layers, encoder_width
        self.shared = bool(shared)
        self.encoder: nn.Module = nn.Identity()
        self.classifier: nn.Module
        if self.shared:
            self.encoder = Encoder(self.shape, encoder_hidden, encoder_layers, encoder_width)
            self.classifier = nn.Linear(self.encoder.n_outputs, n_components)
        else:
            self.classifier = Critic(
                self.shape, n_components, encoder_hidden, encoder_layers, encoder_layers, encoder_width
            )
        self._scale_encoder()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            **super().config,
            "encoder_hidden": self.encoder_hidden,
            "encoder_layers": self.encoder_layers,
            "encoder_width": self.encoder_width,
            "shared": self.shared,
        }

    def set_scale(self, x: Tensor) -> None:
        """Takes mean and standard deviation of samples x [n, ...]; bounded values keep their range."""
        super().set_scale(x)
        self._scale_encoder()

    def _scale_encoder(self) -> None:
        for part in (self.encoder, self.classifier):
            if isinstance(part, Encoder):
                part.set_scale(self.offset, self.scale)

    def logits(self, x: Tensor) -> Tensor:
        """log C(x) up to a constant of each sample, [batch, n_components], for x [batch, ...]."""
        return self.classifier(self.encoder(x))

    def responsibilities(self, x: Tensor) -> Tensor:
        """C(x) ≈ p(k | x), [batch, n_components], for x [batch, ...].

        Raises:
            ValueError: x does not have n_features values per sample.
        """
        return self.logits(x).softmax(1)


MODEL = ResponsibilityGAN
