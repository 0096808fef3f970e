"""Details for blurred images: a conditional GAN with an L1 term, on pairs of a mixture's reconstruction and its image.

Sources: P. Isola, J.-Y. Zhu, T. Zhou, A. A. Efros, Image-to-Image Translation with Conditional Adversarial Networks,
CVPR 2017 (equations 1 to 4); E. Richardson, Y. Weiss, On GANs and GMMs, NeurIPS 2018 (supplement §2.3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.objectives import Batch, Player


class ImageTranslation:
    """A critic of patches D and a generator U, which move once each in a step, on pairs (y, x).

    x is an image and y = μ + A E[z | x] its reconstruction by the most probable component of the model's mixture. With
    f = logit D, s the softplus, means over images and patches, and pixels in [-1, 1] for the L1 term as in the paper:

        D    (E[s(-f(y, x))] + E[s(f(y, U(y)))]) / 2             halved as in §3.3, which Adam does not feel
        U    E[s(-f(y, U(y)))] + λ E|x - U(y)|₁

    Args:
        generator: the player, whose network is a `Pix2Pix`.
        critic: the player, whose network is a `PatchCritic`.
        l1_weight: λ.
    """

    def __init__(self, generator: Player, critic: Player, l1_weight: float) -> None:
        self.players: dict[str, Player] = {"model": generator, "critic": critic}
        self.networks: dict[str, Callable[..., Any]] = {"model": generator.module, "critic": critic.module}
        self.l1_weight = l1_weight
        self._given: Tensor | None = None

    def turns(self, step: int) -> Sequence[str]:
        self._given = None
        return ("critic", "model")

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"].flatten(1)
        given = self._reconstructed(x)
        if player == "critic":
            with torch.no_grad():
                fake = self.networks["model"](given)
            values = self.networks["critic"](given.repeat(2, 1), torch.cat([x, fake]))
            of_real, of_fake = values.split(len(x))
            loss = (F.softplus(-of_real).mean() + F.softplus(of_fake).mean()) / 2
            return loss, {"gap": (of_real.mean() - of_fake.mean()).detach()}
        fake = self.networks["model"](given)
        adversarial = F.softplus(-self.networks["critic"](given, fake)).mean()
        distance = 2 * (x - fake).abs().mean()
        return adversarial + self.l1_weight * distance, {"adversarial": adversarial.detach(), "l1": distance.detach()}

    @torch.no_grad()
    def _reconstructed(self, x: Tensor) -> Tensor:
        """The pairs' other halves, [n, n_features], which both turns of a step share."""
        if self._given is None or len(self._given) != len(x):
            self._given = self._mixture.reconstruct(x)
        return self._given

    @functools.cached_property
    def _mixture(self) -> Any:
        """The model's mixture; its inverse covariances are computed once, as it does not change."""
        module: Any = self.players["model"].module
        module.mixture.precision = functools.cache(module.mixture.precision)
        return module.mixture
