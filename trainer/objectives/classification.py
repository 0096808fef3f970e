"""Cross-entropy of a classifier by stochastic gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trainer.objectives import Batch, Player


class Classification:
    """Mean cross-entropy -1/B Σ log p(label | x), in nats; the network returns logits [batch, n_classes]."""

    def __init__(self, player: Player) -> None:
        self.players: dict[str, Player] = {"model": player}
        self.networks: dict[str, Callable[..., Any]] = {"model": player.module}

    def turns(self, step: int) -> Sequence[str]:
        return ("model",)

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels = self.networks[player](batch["x"]), batch["label"]
        hits = (logits.detach().argmax(1) == labels).float()
        return F.cross_entropy(logits, labels), {"accuracy": hits.mean()}
