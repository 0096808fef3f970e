"""Maximum likelihood (or MAP) by stochastic gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trainer.objectives import Batch, Player


class MaximumLikelihood:
    """Negative mean log-likelihood per sample, -1/B Σ log p(x) - log p(θ) / N, in nats.

    Richardson & Weiss 2018, supplement §1.2, where there is no prior. The network returns (log p(x) [batch],
    log p(θ) []); the prior's weight is one N-th, N the number of training samples, so that the sum over an epoch is
    the log-posterior.
    """

    def __init__(self, player: Player, n_train: int) -> None:
        self.players: dict[str, Player] = {"model": player}
        self.networks: dict[str, Callable[..., Any]] = {"model": player.module}
        self.n_train = n_train

    def turns(self, step: int) -> Sequence[str]:
        return ("model",)

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        log_prob, log_prior = self.networks[player](batch["x"])
        log_likelihood = log_prob.mean()
        return -log_likelihood - log_prior / self.n_train, {"log_likelihood": log_likelihood.detach()}
