"""What the sliced-Wasserstein loss costs beside POT's, and how near codes come to each prior on MNIST.

1. `speed`: one loss and backward at batch 500, L = 50, K = 128 (and K = 2) beside POT's torch backend on the same
   directions, one thread, median of alternating runs. Goal: no slower. Beside it the step of the paper's networks.
2. `priors`: MNIST by a recipe (default mnist-swae-long) for ring, disc, square and bowl: the squared distance of the
   10,000 test codes to the prior over its floor (goal: 10 at most, 3 is the aim), and that ratio over steps; the mean
   squared reconstruction error beside that of mnist-vae and mnist-wae-mmd at the same number of steps. The folder of
   MNIST's files is named in MANYMODES_MNIST. Some 20 minutes for each on two cores; not part of the default.

    python tests/benchmarks/bench_swae.py [speed] [priors] [--recipe NAME] [--steps N] [--prior NAME ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.codes import held_out, measure
from cluster.models import LocalAutoencoder
from cluster.recipe import load_recipe
from data.manifest import Manifest
from data.shards import pack
from data.sources import open_source
from trainer.checkpoint import save_model
from trainer.fit import Fit, trained_tensors
from trainer.loop import Callbacks
from trainer.objectives.autoencoding import random_directions, sliced_wasserstein

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


def mnist(folder: str) -> Manifest:
    place = os.environ.get("MANYMODES_MNIST", str(Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"))
    return pack(open_source(f"mnist:{place}"), folder)


def train(manifest: Manifest, name: str, overrides: list[str], points: int = 6) -> None:
    """Trains in this process and prints ratio and reconstruction error at `points` steps."""
    recipe = load_recipe(name, ["scaling.workers=1", *overrides])
    torch.manual_seed(recipe.training.seed)
    model: Any = recipe.model.build(manifest)
    every = max(1, recipe.training.steps // points)
    training = recipe.training.model_copy(update={"checkpoint_every": every})
    began = time.perf_counter()

    def on_checkpoint(step: int, state: Any) -> None:
        seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            twin = type(model)(**model.config)
            tensors = trained_tensors(state)
            twin.load_state_dict({key: tensors[key] for key in twin.state_dict()})
            save_model(folder, twin, "autoencoder", manifest, dequantised=False)
            found = measure(LocalAutoencoder(folder), held_out(manifest))
        print(
            f"{recipe.model.label:<18} step {step:>6}  {seconds:>6.0f} s  ratio {found.distance.ratio:>8.2f}"
            f"  floor {found.distance.floor:.2e}  mse {found.squared_error:.4f}",
            flush=True,
        )

    Fit(model, manifest, training, objective=recipe.model.objective).run(Callbacks(on_checkpoint=on_checkpoint))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["speed"])
    parser.add_argument("--recipe", default="mnist-swae-long")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--prior", nargs="*", default=["ring", "disc", "square", "bowl"])
    arguments = parser.parse_args()
    if "speed" in arguments.parts:
        speed()
    if "priors" in arguments.parts:
        steps = [f"training.steps={arguments.steps}"] if arguments.steps else []
        with tempfile.TemporaryDirectory() as folder:
            manifest = mnist(folder)
            for prior in arguments.prior:
                train(manifest, arguments.recipe, [*steps, f"model.prior={prior}"])
            for other in ("mnist-vae", "mnist-wae-mmd"):
                train(manifest, other, steps)


if __name__ == "__main__":
    main()
