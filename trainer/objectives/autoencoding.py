"""Autoencoders with their codes shaped to a prior: c(x, ψ(φ(x))) + λ D(p_Z, q_Z).

Sources: S. Kolouri et al., Sliced-Wasserstein Autoencoder, 2018 (equation 13; supplement); I. Tolstikhin et al.,
Wasserstein Auto-Encoders, 2018 (WAE-GAN); A. Makhzani et al., Adversarial Autoencoders, 2015, and W. Gong's thesis,
2017, (2.24); X. Hou et al., Deep Feature Consistent Variational Autoencoder, 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.autoencoder import Coded
from trainer.models.classifier import Classifier
from trainer.models.priors import Prior
from trainer.objectives import Batch, Player
from trainer.objectives.regularisers import OverWorkers, Regulariser


@dataclass(frozen=True)
class Reconstruction:
    """Weights of the terms of c(x, ψ(z)): each is a mean over features, or with `summed` their sum; x̂ = ψ(z).

    Attributes:
        cross_entropy: -x log x̂ - (1 - x) log(1 - x̂), in nats, for values in [0, 1].
        absolute: |x - x̂|.
        squared: (x - x̂)²; this and the former in units of the data's scale, where it is not bounded.
        features: Σ over hidden layers Φ of a classifier of ½ mean (Φ(x) - Φ(x̂))² (Hou et al.); never summed.
    """

    cross_entropy: float = 0.0
    absolute: float = 0.0
    squared: float = 0.0
    features: float = 0.0
    summed: bool = False


class Autoencoding:
    """c(x, ψ(φ(x))) + λ D(p_Z, q_Z), mean over the batch (13).

    Args:
        player: the autoencoder.
        reconstruction: c.
        regulariser: D; None for a bare autoencoder.
        weight: λ.
        stride: every so many-th code alone is decoded: D sees more codes than c sees images.
        classifier: whose layers are the deep features.
    """

    def __init__(
        self,
        player: Player,
        reconstruction: Reconstruction,
        regulariser: Regulariser | None = None,
        weight: float = 1.0,
        *,
        stride: int = 1,
        classifier: Classifier | None = None,
    ) -> None:
        self.players: dict[str, Player] = {"model": player}
        self.networks: dict[str, Callable[..., Any]] = {"model": player.module}
        self.reconstruction, self.regulariser, self.weight = reconstruction, regulariser, weight
        self.stride, self.classifier = stride, classifier
        if classifier is not None:
            classifier.eval().requires_grad_(False)

    def turns(self, step: int) -> Sequence[str]:
        return ("model",)

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"].flatten(1)
        coded: Coded = self.networks["model"](x, self.stride)
        loss, scalars = self._reconstruction(x[:: self.stride], coded.raw)
        if self.regulariser is not None:
            distance = self.regulariser(coded)
            loss = loss + self.weight * distance
            scalars[self.regulariser.name] = distance.detach()
        return loss, scalars

    def _reconstruction(self, x: Tensor, raw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, and each of them as a mean over features."""
        weights = self.reconstruction
        model: Any = self.players["model"].module
        target, predicted = model.scaled(x), raw.sigmoid() if model.bounded else raw
        terms = {
            "cross_entropy": lambda: F.binary_cross_entropy_with_logits(raw, target),
            "absolute": lambda: F.l1_loss(predicted, target),
            "squared": lambda: F.mse_loss(predicted, target),
        }
        found = {name: term() for name, term in terms.items() if getattr(weights, name)}
        factor = model.n_features if weights.summed else 1
        loss = sum((factor * getattr(weights, name) * value for name, value in found.items()), raw.new_zeros(()))
        if self.classifier is not None:
            found["features"] = feature_loss(self.classifier.to(raw.device), x, model.outputs(raw))
            loss = loss + weights.features * found["features"]
        return loss, {name: value.detach() for name, value in found.items()}


class AdversarialAutoencoding(Autoencoding):
    """An autoencoder whose D is a critic f of codes (WAE-GAN; the adversarial autoencoder), which moves first.

    The critic minimises E[softplus(-f(z̃))] + E[softplus(f(φ(x)))], z̃ of the prior; the encoder λ E[softplus(-f(φ(x)))].

    Args:
        player, reconstruction, weight, options: as of `Autoencoding`.
        critic: the player; its network gives [batch, 1] for codes.
        prior: of the codes.
    """

    def __init__(
        self,
        player: Player,
        critic: Player,
        prior: Prior,
        reconstruction: Reconstruction,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(player, reconstruction, None, weight, **options)
        self.players["critic"], self.networks["critic"] = critic, critic.module
        self.prior, self.workers = prior, OverWorkers()
        self.regulariser = self

    name = "adversarial"

    def __call__(self, coded: Coded) -> Tensor:
        return F.softplus(-self.networks["critic"](coded.codes)).mean()

    def turns(self, step: int) -> Sequence[str]:
        return ("critic", "model")

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if player == "model":
            return super().loss(player, batch)
        encoder: Any = self.players["model"].module
        with torch.no_grad():
            codes = encoder.encode(batch["x"].flatten(1))
        # The same draws by N workers as by one, dealt out.
        generator, world = self.workers.generator(codes.device), self.workers.world
        drawn = self.prior.sample(len(codes) * world, generator)[self.workers.rank :: world]
        of_prior, of_codes = self.networks["critic"](torch.cat([drawn, codes])).split(len(codes))
        loss = F.softplus(-of_prior).mean() + F.softplus(of_codes).mean()
        return loss, {"gap": (of_prior.mean() - of_codes.mean()).detach()}


def feature_loss(classifier: Classifier, x: Tensor, rebuilt: Tensor) -> Tensor:
    """Σ over the classifier's hidden layers Φ of ½ mean (Φ(x) - Φ(x̂))² (Hou et al., section 3.2)."""
    with torch.no_grad():
        wanted = classifier.activations(x)
    pairs = zip(classifier.activations(rebuilt), wanted)
    return sum((F.mse_loss(found, other) / 2 for found, other in pairs), rebuilt.new_zeros(()))
