"""One training run of a model on packed data, by stochastic gradients or by EM, on one rank of any number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import augment
from data.manifest import Manifest
from data.stream import ShardStream, read_blocks
from trainer.em import Iteration, fit_em
from trainer.engines import State, broadcast_module, make_engine
from trainer.loop import Callbacks, LogEntry, train
from trainer.objectives import Objective
from trainer.objectives.likelihood import MaximumLikelihood
from trainer.players import AVERAGE, make_player
from trainer.settings import TRAIN_SPLIT, TrainingSettings

_PREVIOUS = "em.objective"
# EM's dequantisation has seeds that no evaluation can have: training and held-out noise stay independent.
_NOISE_SEEDS = 2**32


def maximum_likelihood(model: nn.Module, manifest: Manifest, settings: TrainingSettings) -> Objective:
    """The objective of densities."""
    player = make_player(model, settings.optimiser, settings.steps)
    return MaximumLikelihood(player, manifest.n_samples(TRAIN_SPLIT))


class Fit:
    """Trains `model` on the training split of a pack; the same result on any number of ranks.

    By gradients a step is an optimiser step, by EM a pass over the data (over every variant of every sample, where
    there is augmentation: the noise prior's pseudo-samples then weigh against so many more). `Callbacks` and
    checkpoints (step, state) are the same for both; the state holds the model's tensors as `model.module.<name>` (see
    `trained_tensors`). EM is for mixtures of factor analysers.

    Args:
        model: initialised on rank 0 (the others take over its tensors), or to be restored by `run(resume=...)`.
        manifest: of the pack.
        settings: how.
        rank, world_size: this process' share.
        lanes: see `ShardStream`; default world_size.
        device: where the model is trained.
        objective: by gradients, what is optimised: a function of model, manifest and settings.

    Raises:
        UserError: data that the settings do not fit (see `ShardStream`).
    """

    def __init__(
        self,
        model: Any,
        manifest: Manifest,
        settings: TrainingSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        lanes: int | None = None,
        device: torch.device | None = None,
        objective: Callable[[Any, Manifest, TrainingSettings], Objective] = maximum_likelihood,
    ) -> None:
        self.model, self.manifest, self.settings, self.objective = model, manifest, settings, objective
        self.rank, self.world_size = rank, world_size
        self.device = device or torch.device("cpu")
        self.dequantise = settings.dequantises(manifest.levels)
        self.stream: ShardStream | None = None
        augment.check(settings.augment, manifest.shape)
        if settings.method == "sgd":
            self.stream = ShardStream(
                manifest,
                TRAIN_SPLIT,
                batch_size=settings.batch_size,
                seed=settings.seed,
                rank=rank,
                world_size=world_size,
                lanes=lanes,
                dequantise=self.dequantise,
                augment=settings.augment,
            )

    def order(self) -> dict[str, Any]:
        """All that the order and noise of the data depend on, as JSON: a checkpoint may go on where this is equal."""
        if self.stream is not None:
            return {"method": "sgd", **self.stream.state()}
        return {
            "method": "em",
            "data": self.manifest.fingerprint,
            "split": TRAIN_SPLIT,
            "seed": self.settings.seed,
            "dequantise": self.dequantise,
            "augment": list(self.settings.augment),
        }

    def run(self, callbacks: Callbacks | None = None, resume: tuple[int, State] | None = None) -> State:
        """Trains to the end of the settings and returns the final state.

        Raises:
            SharedError: a loss or likelihood that is not finite, on every rank.
        """
        if self.stream is None:
            return self._by_em(callbacks or Callbacks(), resume)
        settings = self.settings
        objective = self.objective(self.model, self.manifest, settings)
        engine = make_engine(settings, self.device)
        engine.attach(objective)
        return train(objective, engine, self.stream, settings, callbacks=callbacks, resume=resume)

    def _by_em(self, calls: Callbacks, resume: tuple[int, State] | None) -> State:
        settings, model = self.settings.em, self.model.to(self.device)
        done, previous = 0, None
        if resume is not None:
            done, state = resume
            model.load_state_dict({name: state[f"model.module.{name}"] for name in model.state_dict()})
            previous = state[_PREVIOUS].item()
        broadcast_module(model)
        began = time.perf_counter()

        def state_at(objective: float) -> State:
            tensors = {f"model.module.{name}": v.detach().cpu().clone() for name, v in model.state_dict().items()}
            return {**tensors, _PREVIOUS: torch.tensor(objective, dtype=torch.float64)}

        def on_iteration(iteration: Iteration) -> None:
            nonlocal began, done, previous
            done = iteration.number
            previous = float("nan") if iteration.reseeded else iteration.objective
            seconds, began = time.perf_counter() - began, time.perf_counter()
            metrics = {
                "loss": -iteration.objective,
                "log_likelihood": iteration.log_likelihood,
                "reseeded": float(iteration.reseeded),
                "samples_per_second": iteration.samples / max(seconds, 1e-9),
            }
            calls.on_log(LogEntry(done, metrics))
            if done % settings.checkpoint_every == 0 and not iteration.last:
                calls.on_checkpoint(done, state_at(previous))

        fit_em(
            model,
            self._blocks,
            settings,
            done=done,
            previous=previous,
            seed=self.settings.seed,
            on_iteration=on_iteration,
        )
        final = state_at(float("nan") if previous is None else previous)
        calls.on_checkpoint(settings.iterations, final)  # also where it ended early: there is nothing left to do
        return final

    def _blocks(self) -> Iterator[Tensor]:
        """This rank's samples for one pass, with all their variants: the same in every pass."""
        blocks = read_blocks(
            self.manifest,
            TRAIN_SPLIT,
            rank=self.rank,
            world_size=self.world_size,
            dequantise_seed=_NOISE_SEEDS + self.settings.seed if self.dequantise else None,
        )
        for block in blocks:
            for x in augment.variants(block["x"], self.settings.augment):
                yield torch.from_numpy(np.ascontiguousarray(x))


def trained_tensors(state: State) -> State:
    """The model's tensors in a training state, by their names in the model; averages where the optimiser keeps them.

    The player `model` is the model; the tensors of another player, such as a critic, have its name before them.
    """
    found = {}
    for key, value in state.items():
        player, sign, name = key.partition(".module.")
        if sign and "." not in player:
            average = state.get(f"{player}.optimiser.{name}.{AVERAGE}", value)
            found[name if player == "model" else f"{player}.{name}"] = average
    return found
