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
        return self.of(*self.networks[player](batch["x"]))

    def of(self, log_prob: Tensor, log_prior: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, from what the network returned, and the mean log-likelihood."""
        log_likelihood = log_prob.mean()
        return -log_likelihood - log_prior / self.n_train, {"log_likelihood": log_likelihood.detach()}


class PretrainedLikelihood(MaximumLikelihood):
    """Maximum likelihood of a mixture, whose components first learn one label each.

    In the first `pretrain_steps` steps the loss is that of complete data, -1/B Σ log p(x, c), where the component c is
    the sample's label modulo the number of components; of a single component the label is not asked for.
    """

    def __init__(self, player: Player, n_train: int, n_components: int, pretrain_steps: int) -> None:
        super().__init__(player, n_train)
        self.n_components, self.pretrain_steps = n_components, pretrain_steps
        self._pretrains = pretrain_steps > 0

    def turns(self, step: int) -> Sequence[str]:
        self._pretrains = step < self.pretrain_steps
        return super().turns(step)

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if not self._pretrains or self.n_components == 1:
            return super().loss(player, batch)
        component = batch["label"] % self.n_components
        log_prob, log_prior = self.networks[player](batch["x"], component=component)
        return self.of(log_prob, log_prior)
