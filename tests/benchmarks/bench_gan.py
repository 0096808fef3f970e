"""Adversarial training on the ring of six Gaussians: which modes are covered, and the gap to the true density.

A step draws `BATCH` new samples for each turn of the critic and one of the generator, from a seed of its own: nothing
is seen twice. The gap is the mean of log p_true(x) - log p_model(x) over 20,000 samples that are the same for every
model, in nats. A mode is covered where the model puts at least a fifth of its share of 20,000 samples within three
standard deviations of its mean; the share of samples that lie so near to any mode stands beside.

Goals: MixFlow GAN+ML and PGAN within 0.05 nats on each of five seeds, with all six modes. The modes of the
generators without likelihood are stated, and so is what one flow reaches.

Call with names of models (default: all), `--seeds N` and `--steps N`. A minute or two per run on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data.manifest import Manifest, Origin, SplitRecord
from data.toys import Ring
from trainer.engines import DDPEngine
from trainer.families.flow import FlowSettings
from trainer.families.gan import GANSettings
from trainer.initialise_flow import initialise_flow
from trainer.loop import train
from trainer.settings import InitialisationSettings, TrainingSettings

RING, BATCH, STEPS = Ring(), 300, 5000
TEST = RING.draw(20_000, np.random.default_rng(10**9))[0]

ADAM = {"beta1": 0.5, "beta2": 0.9}
GENERATOR = {"learning_rate": 1e-3, "schedule": "cosine", **ADAM}
FINE = {"learning_rate": 5e-3, "schedule": "cosine", **ADAM}  # the thesis' rate of flows, here with a decay
CRITIC = {"n_hidden": 64, "n_layers": 3, "optimiser": {"learning_rate": 1e-3, "schedule": "cosine", **ADAM}}
OWN_CRITICS = {**CRITIC, "n_hidden": 32, "n_layers": 2}
RMS = {"name": "rmsprop", "learning_rate": 5e-4, "beta1": 0, "beta2": 0.99}
# The thesis' penalty of 0.1 for flows and 10 as in WGAN-GP for the others; five turns of the critic as in both.
GAN = {"family": "gan", "n_latent": 2, "n_hidden": 64, "n_layers": 3}
MIXTURE = {"family": "flow", "n_components": 6, "n_couplings": 2, "width": 50, "n_layers": 2}
SINGLE = {"family": "flow", "n_components": 1, "n_couplings": 4, "width": 100, "n_layers": 3}
JOINT = {"gradient_penalty": 0.1, "likelihood_weight": 1.0, "critic": CRITIC}
PURE = {"gradient_penalty": 0.1, "critic": CRITIC}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gan": ({**GAN, "adversarial": {"loss": "non-saturating", "critic_steps": 1, "critic": CRITIC}}, GENERATOR),
    "wgan-clip": ({**GAN, "adversarial": {"critic": {**CRITIC, "weight_clip": 0.05, "optimiser": RMS}}}, RMS),
    "wgan-gp": ({**GAN, "adversarial": {"gradient_penalty": 1.0, "critic": CRITIC}}, GENERATOR),
    "sinkhorn": ({**GAN, "transport": {"epsilon": 0.01, "iterations": 20}}, GENERATOR),
    "flow-gan": ({**SINGLE, "adversarial": PURE}, GENERATOR),
    "flow-gan+ml": ({**SINGLE, "adversarial": JOINT}, GENERATOR),
    "mixflow-gan+ml": ({**MIXTURE, "adversarial": JOINT}, FINE),
    "pgan": ({**MIXTURE, "adversarial": {**JOINT, "assignment": "posterior", "critic": OWN_CRITICS}}, FINE),
    "hard-pgan": ({**MIXTURE, "adversarial": {**JOINT, "assignment": "hard", "critic": OWN_CRITICS}}, FINE),
}


class Fresh:
    """New samples of the ring in every step."""

    def __init__(self, seed: int, batch_size: int, steps: int) -> None:
        self.seed, self.batch_size, self.steps_per_epoch = seed, batch_size, steps

    def loader(self, epoch: int, start_step: int = 0, workers: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(start_step, self.steps_per_epoch):
            rng = np.random.default_rng([self.seed, epoch, step])
            yield {"x": torch.from_numpy(RING.draw(self.batch_size, rng)[0])}


def run(name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains one model and says what it reached, and what it started from."""
    document, optimiser = MODELS[name]
    family = (FlowSettings if document["family"] == "flow" else GANSettings).model_validate(document)
    turns = family.adversarial.critic_steps if family.adversarial else 1
    training = TrainingSettings.model_validate(
        {"steps": steps, "batch_size": BATCH * turns, "seed": seed, "dequantise": False, "optimiser": optimiser}
    )
    manifest = Manifest.model_construct(
        name="ring",
        shape=(2,),
        dtype="float32",
        levels=None,
        source=Origin(spec="ring"),
        splits={"train": SplitRecord.model_construct(samples=BATCH * turns * steps, shards=[])},  # there is no pack
    )
    torch.manual_seed(seed)
    model: Any = family.build(manifest)
    rows = RING.draw(20_000, np.random.default_rng([seed, 10**6]))[0]
    if document["family"] == "flow":
        initialise_flow(model, rows, InitialisationSettings(), seed=seed)
    else:
        model.set_scale(torch.from_numpy(rows))
    start = gap(model)
    engine = DDPEngine(torch.device("cpu"))
    objective = family.objective(model, manifest, training)
    engine.attach(objective)
    began = time.perf_counter()
    train(objective, engine, Fresh(seed, BATCH * turns, steps), training)
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
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("model            seed  gap at step 0  gap (nats)  modes of 6  near a mode  seconds")
    for name in arguments.models:
        for seed in range(arguments.seeds):
            r = run(name, seed, arguments.steps)
            print(
                f"{name:<16} {seed:>4}  {r['start']:>13.4f}  {r['gap']:>10.4f}  {r['modes']:>10.0f}  {r['near']:>11.3f}"
                f"  {r['seconds']:>7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
