"""Builds a player from a network and its optimiser settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.objectives import Player, averaging_decay
from trainer.settings import OptimiserSettings

# Moments of an optimiser: the running average of a parameter, and how many updates it is of.
AVERAGE, _AVERAGED = "average", "averaged"


def make_player(
    module: nn.Module, settings: OptimiserSettings, steps: int, *, weight_clip: float | None = None
) -> Player:
    """A player whose learning rate follows the settings' schedule over `steps` steps.

    With `weight_clip` c every update ends with all parameters held within [-c, c]. With `settings.average` the
    optimiser keeps an average of each parameter among its moments (`AVERAGE`).

    Only element-wise update rules are offered: ZeRO flattens parameters, which others would not notice.
    """
    s = settings
    parameters = list(module.parameters())
    optimiser: torch.optim.Optimizer
    if s.name == "adam":
        # Fused: one pass over the weights and their moments; by torch's default it was up to a third of a step on CPUs.
        optimiser = torch.optim.Adam(parameters, s.learning_rate, betas=(s.beta1, s.beta2), fused=True)
    elif s.name == "rmsprop":
        optimiser = torch.optim.RMSprop(parameters, s.learning_rate, alpha=s.beta2, momentum=s.beta1)
    else:
        optimiser = torch.optim.SGD(parameters, s.learning_rate, momentum=s.beta1)
    if weight_clip is not None:
        optimiser.register_step_post_hook(_clip(weight_clip))
    if s.average:
        optimiser.register_step_post_hook(_average(s.average))
    return Player(module, optimiser, learning_rate_schedule(s, steps), s.gradient_clip)


def _clip(bound: float) -> Callable[..., None]:
    """A hook of the optimiser, not of the module: ZeRO updates flat copies of its own, which would undo the clip."""

    @torch.no_grad()
    def hook(optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-bound, bound)

    return hook


def _average(decay: float) -> Callable[..., None]:
    """A hook that moves each parameter's average towards it; see `averaging_decay`."""

    @torch.no_grad()
    def hook(optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue  # it did not move; and Adam takes a state that is not empty for its own
                state = optimiser.state[parameter]
                if AVERAGE not in state:
                    state[AVERAGE], state[_AVERAGED] = parameter.detach().clone(), torch.zeros(())
                updates = int(state[_AVERAGED])
                # The first is of what moved once, also where an engine made the moments before that.
                state[AVERAGE].lerp_(parameter, 1 - averaging_decay(decay, updates) if updates else 1.0)
                state[_AVERAGED] += 1

    return hook


def learning_rate_schedule(settings: OptimiserSettings, steps: int) -> Callable[[int], float]:
    """The learning rate at each step: linear warm-up, then constant or a half cosine down to zero at `steps`."""
    s = settings

    def rate(step: int) -> float:
        if step < s.warmup_steps:
            return s.learning_rate * (step + 1) / s.warmup_steps
        if s.schedule == "constant":
            return s.learning_rate
        done = (step - s.warmup_steps) / max(1, steps - s.warmup_steps)
        return s.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return rate
