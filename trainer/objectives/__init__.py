"""The seam between a training objective and the loop: players, turns, and `loss(player, batch)`.

A new objective is one file here. It never writes a training step: gradients, synchronisation, clipping, the guard
against non-finite losses, checkpoints and logging belong to the loop and the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass
class Player:
    """A network with its optimiser: one for maximum likelihood, a generator and a critic for a GAN.

    `learning_rate` maps the step (from 0) to the rate, a pure function, so that a resumed run needs no state for it.
    """

    module: nn.Module
    optimiser: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    gradient_clip: float | None = None


class Objective(Protocol):
    """What is optimised, by whom, in which order.

    `networks` holds what a loss may call: before training the players' modules; then the engine puts there, for the
    player whose turn it is, the wrapped module (its `forward` synchronises gradients), and for the others their bare
    modules with gradients off. A loss calls `self.networks[name](...)`, and `self.players[name].module` only for what
    needs no gradient or a second derivative.
    """

    players: dict[str, Player]
    networks: dict[str, Callable[..., Any]]

    def turns(self, step: int) -> Sequence[str]:
        """The players that move in this step, in order; a critic that moves five times stands there five times."""
        ...

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The player's loss (a scalar, mean over the local batch) and scalars worth logging."""
        ...


def averaging_decay(decay: float, updates: int) -> float:
    """The decay of an average after so many updates t: at most (1 + t) / (10 + t), so that it forgets the start."""
    return min(decay, (1 + updates) / (10 + updates))
