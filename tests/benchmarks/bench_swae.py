"""What the sliced-Wasserstein loss costs beside POT's.

One loss and backward at batch 500, L = 50, K = 128 (and K = 2) beside POT's torch backend on the same directions, one
thread, median of alternating runs. Goal: no slower. How near codes come to their priors is `manymodes reproduce
swae-mnist`.

    python tests/benchmarks/bench_swae.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from trainer.objectives.regularisers import random_directions, sliced_wasserstein

BATCH, PROJECTIONS = 500, 50


def alternating(functions: dict[str, Callable[[], Any]], rounds: int = 40) -> dict[str, float]:
    """Median milliseconds of each, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 3):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if number >= 3:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


def speed() -> None:
    import ot

    torch.set_num_threads(1)
    print(f"loss and backward, batch {BATCH}, L = {PROJECTIONS}, ms on one thread")
    for k in (2, 128):
        g = torch.Generator().manual_seed(0)
        codes = torch.randn(BATCH, k, generator=g, requires_grad=True)
        drawn, directions = torch.rand(BATCH, k, generator=g), random_directions(PROJECTIONS, k, g)

        def backward(loss: Callable[[], Any], codes: torch.Tensor = codes) -> Callable[[], None]:
            def run() -> None:
                codes.grad = None
                loss().backward()

            return run

        found = alternating(
            {
                "ours": backward(lambda c=codes, d=drawn, o=directions: sliced_wasserstein(c, d, o)),
                "POT": backward(
                    lambda c=codes, d=drawn, o=directions: ot.sliced_wasserstein_distance(c, d, projections=o.T) ** 2
                ),
            }
        )
        print(f"  K = {k:<4} ours {found['ours']:.2f}   POT {found['POT']:.2f}   {found['POT'] / found['ours']:.1f}x")


if __name__ == "__main__":
    speed()
