"""Generator against critic: GAN, Wasserstein GAN, both with likelihood (FlowGAN), and mixtures of critics (PGAN).

Sources: I. Goodfellow et al., Generative Adversarial Nets, 2014; M. Arjovsky, S. Chintala, L. Bottou, Wasserstein GAN,
2017; I. Gulrajani et al., Improved Training of Wasserstein GANs, 2017; A. Grover, M. Dhar, S. Ermon, Flow-GAN, 2018;
W. Gong, Wasserstein Generative Adversarial Network, MPhil thesis, Cambridge, 2017 (equation numbers are of the thesis).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.objectives import Batch, Player
from trainer.objectives.likelihood import MaximumLikelihood

Loss = Literal["non-saturating", "minimax", "wasserstein"]
Assignment = Literal["single", "posterior", "hard"]


class Adversarial:
    """A generator G (the player `model`) that moves once, after its critic f (`critic`) moved `critic_steps` times.

    A step's batch is dealt out to the critic's turns, each of which sees new data and new noise; the likelihood is
    taken of the last turn's share. Loss of the critic, then of the generator, both minimised:

        non-saturating   E[softplus(-f(x))] + E[softplus(f(G(z)))],   E[softplus(-f(G(z)))]      (2.1), §2.2
        minimax          the same,                                   -E[softplus(f(G(z)))]       (2.1)
        wasserstein      E[f(G(z))] - E[f(x)],                       -E[f(G(z))]                 (2.16)

    With `gradient_penalty` λ the critic also pays λ E[(|∇f(x̂)| - 1)²] at x̂ = ε x + (1 - ε) G(z), ε uniform in [0, 1]
    for each pair (2.23). With `real_penalty` γ one critic alone pays γ/2 E|∇f(x)|² at the data, where it then is flat
    (R1 of L. Mescheder, A. Geiger, S. Nowozin, Which Training Methods for GANs do actually Converge?, ICML 2018). With
    `likelihood_weight` λ the generator also pays -λ (E[log p(x)] + log p(θ) / N) (2.29, 4.10); a mixture's weights
    learn from that alone, as samples are differentiable in the components only (Algorithm 6). Weight clipping belongs
    to the critic's optimiser (`make_player`).

    With one critic per component, f(x) = Σ_c p(c | x) f_c(x), where the posterior is the generator's own and constant
    in every gradient (4.13); its logits may be divided by a `temperature`. "hard" puts it on the likeliest component,
    and a generated sample on the component that it comes from (4.12, with the prior in the posterior). A constant
    posterior leaves nothing that moves samples from one component's place to another's, and no bound on how critics
    differ there: with `posterior_slope` ∇f(x) also has the posterior's own slope, Σ_c f_c(x) ∇p(c | x), in the penalty
    and where samples move, while no parameter learns through it.

    The generator is called as `generator(x or None, n)` and gives (log p(x) [batch] or None, log p(θ) [], samples
    [n, d], components [n]); assignment asks it for `component_log_prob`.

    Args:
        generator, critic: the players; the critic's network gives [batch, 1], or [batch, T] with assignment.
        likelihood: the generator's, with the same player; None for one that has no density.
        pretrain_steps: first so many steps of `likelihood` alone, of the whole batch.
        loss, critic_steps, gradient_penalty, real_penalty, likelihood_weight, assignment, temperature, posterior_slope:
            see above.
    """

    def __init__(
        self,
        generator: Player,
        critic: Player,
        *,
        loss: Loss = "wasserstein",
        critic_steps: int = 5,
        gradient_penalty: float | None = None,
        real_penalty: float | None = None,
        likelihood: MaximumLikelihood | None = None,
        likelihood_weight: float = 0.0,
        pretrain_steps: int = 0,
        assignment: Assignment = "single",
        temperature: float = 1.0,
        posterior_slope: bool = False,
    ) -> None:
        self.players: dict[str, Player] = {"model": generator, "critic": critic}
        self.networks: dict[str, Callable[..., Any]] = {"model": generator.module, "critic": critic.module}
        self.kind, self.critic_steps = loss, critic_steps
        self.gradient_penalty, self.real_penalty = gradient_penalty, real_penalty
        self.likelihood, self.likelihood_weight, self.pretrain_steps = likelihood, likelihood_weight, pretrain_steps
        self.assignment, self.temperature, self.posterior_slope = assignment, temperature, posterior_slope
        if likelihood is not None:
            likelihood.networks = self.networks
        self._pretrains, self._moves = False, 0
        self._points: Sequence[Tensor] = ()
        self._weights: Sequence[CriticWeights | None] = ()

    def turns(self, step: int) -> Sequence[str]:
        self._pretrains, self._moves = step < self.pretrain_steps, 0
        if self._pretrains and self.likelihood is not None:
            return self.likelihood.turns(step)
        return ("critic",) * self.critic_steps + ("model",)

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if player == "critic":
            return self._critic_loss(batch["x"])
        if self._pretrains and self.likelihood is not None:
            return self.likelihood.loss(player, batch)
        return self._generator_loss(mini_batch(batch["x"], -1, self.critic_steps))

    def _critic_loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        turn = self._moves % self.critic_steps
        if turn == 0:  # the generator stands still until the critic has moved for the last time
            self._points, self._weights = self._prepared(x)
        self._moves += 1
        points = [mini_batch(part, turn, self.critic_steps) for part in self._points]
        weights = [w and w.share(turn, self.critic_steps) for w in self._weights]
        values = self.networks["critic"](torch.cat(points[:2])).split(len(points[0]))
        of_real, of_fake = (_mixed(*each) for each in zip(values, weights, points))
        gap = of_real.mean() - of_fake.mean()
        loss = -gap if self.kind == "wasserstein" else F.softplus(-of_real).mean() + F.softplus(of_fake).mean()
        scalars = {"gap": gap.detach()}
        if self.gradient_penalty is not None:
            # The bare network: DeepSpeed's wrapper cannot be differentiated twice.
            penalty = gradient_penalty(self.players["critic"].module, points[2], weights[2])
            loss = loss + self.gradient_penalty * penalty
            scalars["penalty"] = penalty.detach()
        if self.real_penalty is not None:
            penalty = real_penalty(self.players["critic"].module, points[0])
            loss = loss + self.real_penalty * penalty
            scalars["penalty"] = penalty.detach()
        return loss, scalars

    @torch.no_grad()
    def _prepared(self, x: Tensor) -> tuple[Sequence[Tensor], Sequence[CriticWeights | None]]:
        """Data, samples and (for the penalty) points between, each [batch, d]; and the critics' weights at them."""
        real = x.flatten(1)
        _, _, fake, components = self.networks["model"](None, len(real))
        points = [real, fake]
        if self.gradient_penalty is not None:
            points.append(torch.lerp(fake, real, self._interpolation(len(real)).to(real)))
        weights = [self._weights_at(part, sloped=number == 2) for number, part in enumerate(points)]
        if self.assignment == "hard":
            weights[1] = self._own(components)
        return points, weights

    def _generator_loss(self, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        n = len(real)
        likelihood = self.likelihood if self.likelihood_weight else None
        log_prob, log_prior, fake, components = self.networks["model"](None if likelihood is None else real, n)
        values = self.networks["critic"](fake)
        own = self._own(components) if self.assignment == "hard" else self._weights_at(fake, sloped=True)
        value = _mixed(values, own, fake)
        if self.kind == "wasserstein":
            loss = -value.mean()
        else:
            loss = F.softplus(-value).mean() if self.kind == "non-saturating" else -F.softplus(value).mean()
        if likelihood is not None:
            by_likelihood, scalars = likelihood.of(log_prob, log_prior)
            return loss + self.likelihood_weight * by_likelihood, {"adversarial": loss.detach(), **scalars}
        # What only the likelihood would train (a mixture's weights) gets a gradient of zero: DDP waits for each.
        return loss + 0 * sum(p.sum() for p in self.players["model"].module.parameters()), {}

    def _weights_at(self, x: Tensor, sloped: bool) -> CriticWeights | None:
        """The critics' weights at x, with their slopes where these count; None where there is one critic."""
        if self.assignment == "single":
            return None
        sloped = sloped and self.posterior_slope
        return critic_weights(self.players["model"].module, x, self.assignment, self.temperature, sloped)

    def _own(self, components: Tensor) -> CriticWeights:
        model: Any = self.players["model"].module
        return CriticWeights(F.one_hot(components, model.n_components).float())

    def _interpolation(self, n: int) -> Tensor:
        return torch.rand(n, 1)


class CriticWeights(NamedTuple):
    """What each critic of a mixture counts at points x: `values` [n, T], and perhaps `slopes` in x, [n, T, d]."""

    values: Tensor
    slopes: Tensor | None = None

    def share(self, number: int, count: int) -> CriticWeights:
        """Those of the points that `mini_batch` takes."""
        chosen = slice(number % count, None, count)
        return CriticWeights(self.values[chosen], None if self.slopes is None else self.slopes[chosen])

    def at(self, x: Tensor) -> Tensor:
        """The values [n, T], whose gradient in x [n, d] are the slopes."""
        if self.slopes is None:
            return self.values
        return self.values + torch.einsum("ntd,nd->nt", self.slopes, x - x.detach())


def critic_weights(
    density: Any, x: Tensor, assignment: Assignment, temperature: float = 1.0, sloped: bool = False
) -> CriticWeights:
    """The weights of critics at x [batch, d]: p(c | x), smoothed, or all of the likeliest; constants but for x."""
    with torch.set_grad_enabled(sloped):
        x = x.detach().requires_grad_(sloped)
        joint: Tensor = density.component_log_prob(x)
        if assignment == "hard":
            return CriticWeights(F.one_hot(joint.argmax(1), joint.shape[1]).to(joint))
        # Where x has no density at all, every component weighs the same.
        values = (joint / temperature).clamp_min(torch.finfo(joint.dtype).min).softmax(1)
        if not sloped:
            return CriticWeights(values)
        each = [torch.autograd.grad(part, x, retain_graph=True)[0] for part in values.sum(0)]
    return CriticWeights(values.detach(), torch.stack(each, 1))


def gradient_penalty(critic: nn.Module, x: Tensor, weights: CriticWeights | None = None) -> Tensor:
    """Mean over the samples x [batch, d] of (|∇f(x)|₂ - 1)², differentiable in the critic's parameters (2.23).

    f(x) is the critic's value [batch, 1], or Σ_c w_c f_c(x) with the weights of a mixture at x.
    """
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(_mixed(critic(x), weights, x).sum(), x, create_graph=True)
    return (torch.linalg.vector_norm(gradient, dim=1) - 1).square().mean()


def real_penalty(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Half the mean over samples x [batch, d] of |∇f(x)|², differentiable in the parameters of f (R1; see above)."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.square().sum(1).mean() / 2


def mini_batch(x: Tensor, number: int, count: int) -> Tensor:
    """Share `number` (modulo `count`) of `count` equal ones of x [batch, ...], as [batch / count, d].

    Shares are strided: those of N workers together are those of one, where each lane's rows divide.

    Raises:
        ValueError: the batch does not divide.
    """
    if len(x) % count:
        raise ValueError(f"a batch of {len(x)} samples cannot be shared by {count} turns of the critic")
    return x[number % count :: count].flatten(1)


def _mixed(values: Tensor, weights: CriticWeights | None, x: Tensor) -> Tensor:
    """Σ_c w_c f_c, [batch], for values [batch, T] at x; of one critic its value."""
    return values.squeeze(1) if weights is None else (values * weights.at(x)).sum(1)
