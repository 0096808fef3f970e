"""Adversarial training on the ring of six Gaussians: which modes are covered, and the gap to the true density.

The recipes ring-*, but for their data: every step draws new samples from a seed of its own, so that nothing is seen
twice. The gap is the mean of log p_true(x) - log p_model(x) over 20,000 samples that are the same for every model, in
nats. A mode is covered where the model puts at least a fifth of its share of 20,000 samples within three standard
deviations of its mean; the share of samples that lie so near to any mode (of the ring: 0.989) stands beside.

Goals: MixFlow GAN+ML and PGAN within 0.05 nats on each of five seeds, with all six modes. The modes of the
generators without likelihood are stated, and so is what one flow reaches.

    python tests/benchmarks/bench_gan.py [MODEL ...] [--seeds N]

Half a minute to four minutes per run on a core of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cluster.recipe import load_recipe
from data.manifest import Manifest, Origin, SplitRecord
from data.toys import Ring
from trainer.engines import DDPEngine
from trainer.initialise_flow import initialise_flow
from trainer.loop import train

RING = Ring()
TEST = RING.draw(20_000, np.random.default_rng(10**9))[0]
# What is measured: a recipe, and what is changed in it.
MODELS: dict[str, tuple[str, list[str]]] = {
    "ring-gan": ("ring-gan", []),
    "ring-wgan-clip": ("ring-wgan-clip", []),
    "ring-wgan-gp": ("ring-wgan-gp", []),
    "ring-sinkhorn": ("ring-sinkhorn", []),
    "one flow, GAN": ("ring-flowgan", ["model.adversarial.likelihood_weight=0"]),
    "ring-flowgan": ("ring-flowgan", []),
    "ring-mixflow-gan": ("ring-mixflow-gan", []),
    "ring-pgan": ("ring-pgan", []),
    "hard assignment": ("ring-pgan", ["model.adversarial.assignment=hard"]),
}


class Fresh:
    """New samples of the ring in every step."""

    def __init__(self, seed: int, batch_size: int, steps: int) -> None:
        self.seed, self.batch_size, self.steps_per_epoch = seed, batch_size, steps

    def loader(self, epoch: int, start_step: int = 0, workers: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(start_step, self.steps_per_epoch):
            rng = np.random.default_rng([self.seed, epoch, step])
            yield {"x": torch.from_numpy(RING.draw(self.batch_size, rng)[0])}


def run(name: str, seed: int) -> dict[str, float]:
    """Trains one model and says what it reached, and what it started from."""
    recipe = load_recipe(MODELS[name][0], [*MODELS[name][1], f"training.seed={seed}"])
    family, training = recipe.model, recipe.training
    manifest = Manifest.model_construct(
        name="ring",
        shape=(2,),
        dtype="float32",
        levels=None,
        source=Origin(spec="ring"),
        splits={"train": SplitRecord.model_construct(samples=training.batch_size * training.steps, shards=[])},
    )
    torch.manual_seed(seed)
    model: Any = family.build(manifest)
    rows = RING.draw(20_000, np.random.default_rng([seed, 10**6]))[0]
    if family.family == "flow":
        initialise_flow(model, rows, recipe.initialisation, seed=seed)
    else:
        model.set_scale(torch.from_numpy(rows))
    start = gap(model)
    engine = DDPEngine(torch.device("cpu"))
    objective = family.objective(model, manifest, training)
    engine.attach(objective)
    began = time.perf_counter()
    train(objective, engine, Fresh(seed, training.batch_size, training.steps), training)
    seconds = time.perf_counter() - began
    model.eval()
    return {"start": start, "gap": gap(model), **coverage(model), "seconds": seconds}


def gap(model: Any) -> float:
    if not hasattr(model, "log_prob"):
        return float("nan")
    with torch.no_grad():
        return float(np.mean(RING.log_density(TEST) - model.log_prob(torch.from_numpy(TEST)).double().numpy()))


def coverage(model: Any) -> dict[str, float]:
    """Modes covered, and the share of samples within three standard deviations of any."""
    x = model.sample(20_000, torch.Generator().manual_seed(0)).numpy()
    distance = np.linalg.norm(x[:, None] - RING.means, axis=2)
    near = distance.min(1) <= 3 * RING.variance**0.5
    counts = np.bincount(distance.argmin(1)[near], minlength=len(RING.means))
    return {"modes": float((counts >= len(x) / len(RING.means) / 5).sum()), "near": float(near.mean())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("model            seed  gap at step 0  gap (nats)  modes of 6  near a mode  seconds")
    for name in arguments.models:
        for seed in range(arguments.seeds):
            r = run(name, seed)
            print(
                f"{name:<16} {seed:>4}  {r['start']:>13.4f}  {r['gap']:>10.4f}  {r['modes']:>10.0f}  {r['near']:>11.3f}"
                f"  {r['seconds']:>7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
