"""What clipping does to a critic (W. Gong, MPhil thesis, Cambridge 2017, Figures 2.3 and 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cluster.reproductions.study import Column, Member, Outcomes, Reproduction, Trained
from cluster.reproductions.thesis_toys import critic_values
from data import toys
from eval import density_figures as figures
from eval.report import ReportFigure
from trainer.objectives import Player

if TYPE_CHECKING:
    from cluster.recipe import Recipe
    from data.manifest import Manifest
    from trainer.objectives import Batch, Objective
    from trainer.settings import TrainingSettings

_NOISE = 0.1
# Weights that are within so small a share of the largest one are at the limit.
_AT_LIMIT = 0.02


class _CriticAlone:
    """An adversarial objective whose generator stands still: it gives the data, with noise on it."""

    def __init__(self, whole: Any, fixed: nn.Module) -> None:
        self.whole = whole
        whole.players["model"] = Player(fixed, torch.optim.SGD(fixed.parameters(), 0.0), lambda step: 0.0)
        whole.networks["model"] = fixed
        self.players, self.networks = whole.players, whole.networks

    def turns(self, step: int) -> Sequence[str]:
        return [player for player in self.whole.turns(step) if player == "critic"]

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss: tuple[Tensor, dict[str, Tensor]] = self.whole.loss(player, batch)
        return loss


class _NoisyData(nn.Module):
    """Samples of a toy distribution with Gaussian noise of standard deviation 0.1."""

    def __init__(self, toy: Any) -> None:
        super().__init__()
        self.toy = toy
        self.none = nn.Parameter(torch.zeros(1))  # a player has parameters

    def forward(self, x: Tensor | None, n: int) -> tuple[None, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        data, component = self.toy.draw(n, rng)
        noisy = (torch.from_numpy(data) + _NOISE * torch.randn(n, data.shape[1])).to(self.none)
        return None, noisy.new_zeros(()), noisy + 0 * self.none, torch.from_numpy(component).to(noisy.device)


class Critics(Reproduction):
    """A critic between seven Gaussians and the same with noise: Figures 2.3 and 2.4."""

    name: ClassVar[str] = "thesis-critics"
    summary: ClassVar[str] = "critics under clipping and under gradient penalty (Gong 2017, Figures 2.3 and 2.4)"
    source: ClassVar[str] = "W. Gong, MPhil thesis, Cambridge 2017, Figures 2.3 and 2.4"
    members: ClassVar[tuple[Member, ...]] = (
        Member("gradient penalty", "ring-wgan-gp", ("data.source=seven",)),
        Member("weight clipping", "ring-wgan-clip", ("data.source=seven",)),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("gap", "E f(data) - E f(noisy data)", 4),
        Column("slope", "mean |∇f| at data", 3),
        Column("at_limit", "weights at the limit", 3),
        Column("weight", "largest weight", 3),
    )
    note: ClassVar[str] = (
        "The generator stands still: it gives the seven-component data with Gaussian noise of standard deviation 0.1. "
        "At the limit: weights within 2 % of the largest."
    )
    seeds: ClassVar[int] = 3
    curve: ClassVar[str] = "critic_gap"

    def objective(self, recipe: Recipe) -> Callable[[Any, Manifest, TrainingSettings], Objective]:
        def make(model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
            whole = recipe.model.objective(model, manifest, training)
            return _CriticAlone(whole, _NoisyData(toys.toy(manifest.source.spec)))

        return make

    def measure(self, trained: Trained) -> dict[str, float]:
        if trained.critic is None:
            return {}
        toy = toys.toy(trained.manifest.source.spec)
        rng = np.random.default_rng(trained.seed)
        data = torch.from_numpy(toy.draw(20_000, rng)[0])
        noisy = data + _NOISE * torch.from_numpy(rng.standard_normal(data.shape, np.float32))
        x = data.clone().requires_grad_()
        (slope,) = torch.autograd.grad(trained.critic(x).sum(), x)
        weights = _weights(trained.critic)
        largest = float(np.abs(weights).max())
        return {
            "gap": float((trained.critic(data).mean() - trained.critic(noisy).mean()).detach()),
            "slope": float(slope.norm(dim=1).mean()),
            "at_limit": float((np.abs(weights) >= (1 - _AT_LIMIT) * largest).mean()),
            "weight": largest,
        }

    def draw(self, trained: Trained) -> dict[str, np.ndarray]:
        truth, _ = toys.toy(trained.manifest.source.spec).draw(2000, np.random.default_rng(0))
        margin = 0.15 * np.ptp(truth, axis=0)
        extent = np.stack([truth.min(0) - margin, truth.max(0) + margin], axis=1)
        critic = {"critic": critic_values(trained, extent), "weights": _weights(trained.critic)}
        return {"truth": truth, "extent": extent, **critic}

    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        panels = [figures.Panel(label, found[0].drawn) for label, found in outcomes.items() if found]
        picture = figures.critic_surfaces(panels)
        caption = "Values of the critic over the data (orange), and its weights; first seed."
        return [ReportFigure("Critics", picture, caption, "Critic surfaces and histograms of their weights")]


def _weights(critic: nn.Module) -> np.ndarray:
    """All weights and biases, [n]."""
    return torch.cat([parameter.detach().flatten() for parameter in critic.parameters()]).numpy()
