"""Entropic optimal transport between mini-batches, differentiable through Sinkhorn's iterations.

Sources: M. Cuturi, Sinkhorn Distances, NeurIPS 2013; A. Genevay, G. Peyré, M. Cuturi, Learning Generative Models with
Sinkhorn Divergences, AISTATS 2018 (Algorithm 4 of W. Gong's thesis); J. Feydy et al., Interpolating between Optimal
Transport and MMD using Sinkhorn Divergences, AISTATS 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.objectives import Batch, Player
from trainer.objectives.adversarial import mini_batch


class EntropicTransport(NamedTuple):
    """A plan π between two weighted sets, and what it costs.

    `cost` is <π, C>, as Algorithm 4 has it; `value` is <π, C> + ε KL(π || a ⊗ b), the minimum that π attains, taken
    as the dual objective. `violation` is the L1 distance of π's row sums from a (its column sums are b).
    """

    cost: Tensor
    value: Tensor
    plan: Tensor
    violation: Tensor


def entropic_transport(
    cost: Tensor, epsilon: float | Tensor, iterations: int, a: Tensor | None = None, b: Tensor | None = None
) -> EntropicTransport:
    """min over plans π of <π, C> + ε KL(π || a ⊗ b) for a cost C [n, m], by `iterations` of Sinkhorn's.

    All in the log domain, so that no ε > 0 overflows; autograd differentiates through every iteration.

    Args:
        cost: C [n, m], any.
        epsilon: ε > 0, in units of the cost.
        iterations: updates of both potentials, at least one.
        a, b: weights [n] and [m] that sum to one; None is uniform. A weight of zero takes its row out.

    Raises:
        ValueError: sizes that do not fit, or no iteration.
    """
    if cost.ndim != 2 or not cost.numel() or iterations < 1:
        raise ValueError(f"transport needs a cost [n, m] and an iteration or more, got {tuple(cost.shape)}")
    n, m = cost.shape
    log_a = _log_weights(a, n, cost).unsqueeze(1)
    log_b = _log_weights(b, m, cost)
    kernel = -cost / epsilon
    g = kernel.new_zeros(m)  # potentials in units of ε
    for _ in range(iterations):
        f = -torch.logsumexp(kernel + (log_b + g), 1, keepdim=True)
        g = -torch.logsumexp(kernel + (log_a + f), 0)
    plan = (kernel + (log_a + f) + (log_b + g)).exp()
    weight_a, weight_b = log_a.squeeze(1).exp(), log_b.exp()
    # At a weight of zero a potential counts nothing, however far it is.
    value = epsilon * (weight_a @ f.squeeze(1) + weight_b @ g)
    return EntropicTransport((plan * cost).sum(), value, plan, (plan.sum(1) - weight_a).abs().sum())


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    iterations: int,
    cost: Callable[[Tensor, Tensor], Tensor] | None = None,
    found: EntropicTransport | None = None,
) -> Tensor:
    """OT_ε(x, y) - OT_ε(x, x)/2 - OT_ε(y, y)/2 between samples x [n, d] and y [m, d], uniform weights (Feydy et al.).

    OT_ε is the regularised minimum (`EntropicTransport.value`); the divergence of equal sets is zero and no other is
    below zero, once the iterations have converged. `cost` gives [n, m] and is symmetric; by default |x - y|².
    `found` is the transport between x and y, where it is known already.
    """
    between = cost or squared_distances
    own = (_symmetric_value(between(z, z), epsilon, iterations) for z in (x, y))
    found = found or entropic_transport(between(x, y), epsilon, iterations)
    return found.value - sum(own) / 2


def _symmetric_value(cost: Tensor, epsilon: float | Tensor, iterations: int) -> Tensor:
    """OT_ε of a set with itself, C [n, n]: one potential, moved half way, converges in a few iterations."""
    log_a = _log_weights(None, len(cost), cost)
    kernel = -cost / epsilon
    f = kernel.new_zeros(len(cost))
    for _ in range(iterations):
        f = (f - torch.logsumexp(kernel + (log_a + f), 1)) / 2
    return 2 * epsilon * f.mean()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|², [n, m], for x [n, d] and y [m, d]; by one matrix product, about y's mean."""
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return (squares - 2 * x @ y.T).clamp_min(0)


def _log_weights(weights: Tensor | None, n: int, like: Tensor) -> Tensor:
    if weights is None:
        weights = like.new_full((n,), 1 / n)
    if weights.shape != (n,):
        raise ValueError(f"transport of {n} samples needs as many weights, got {tuple(weights.shape)}")
    return weights.log().clamp_min(torch.finfo(like.dtype).min / 4)


class Transport:
    """A generator (the player `model`) trained by the transport between its samples and the data (Algorithm 4).

    The cost is |x - y|², or, with the player `critic`, |φ(x) - φ(y)|² in an embedding that moves `critic_steps` times
    before each turn of the generator to make the transport costlier; turns then share the batch as an
    `Adversarial` objective's do. Each worker transports its own share of a batch, and workers take the mean.

    Args:
        generator: the player; its network is called as `generator(None, n)` and gives samples in third place.
        critic: the player that embeds, or None.
        epsilon: ε as a share of the mean of the cost over the mini-batch, which is constant in the gradient.
        iterations: Sinkhorn's.
        debiased: take the Sinkhorn divergence, not the bare <π, C>, which draws samples together by about ε.
        critic_steps: turns of the critic.
    """

    def __init__(
        self,
        generator: Player,
        critic: Player | None = None,
        *,
        epsilon: float = 0.1,
        iterations: int = 50,
        debiased: bool = True,
        critic_steps: int = 1,
    ) -> None:
        self.players: dict[str, Player] = {"model": generator} | ({"critic": critic} if critic else {})
        self.networks: dict[str, Callable[..., Any]] = {name: p.module for name, p in self.players.items()}
        self.epsilon, self.iterations, self.debiased = epsilon, iterations, debiased
        self.critic_steps = critic_steps if critic else 1
        self._moves = 0

    def turns(self, step: int) -> Sequence[str]:
        self._moves = 0
        return ("critic",) * (self.critic_steps if "critic" in self.players else 0) + ("model",)

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        moving = player == "critic"
        x = mini_batch(batch["x"], self._moves if moving else -1, self.critic_steps)
        self._moves += moving
        with torch.set_grad_enabled(not moving):
            samples = self.networks["model"](None, len(x))[2]
        if "critic" in self.players:
            samples, x = self.networks["critic"](torch.cat([samples, x])).split(len(x))
        between = squared_distances(samples, x)
        epsilon = self.epsilon * between.detach().mean().clamp_min(torch.finfo(between.dtype).tiny)
        found = entropic_transport(between, epsilon, self.iterations)
        cost = found.cost
        if self.debiased:
            cost = sinkhorn_divergence(samples, x, epsilon, self.iterations, found=found)
        # How far the iterations were from their end: nearer to zero by more of them, or by a larger ε.
        return -cost if moving else cost, {"transport": cost.detach(), "violation": found.violation.detach()}
