"""The one training loop: every objective, every engine, any number of workers, resumable at any checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from data.errors import SharedError
from trainer.engines import Engine, State, mean_and_max_over_ranks
from trainer.objectives import Batch, Objective
from trainer.settings import TrainingSettings


class BatchStream(Protocol):
    """What the loop asks of the data: the same number of steps on every rank, and a start at any of them."""

    steps_per_epoch: int

    def loader(self, epoch: int, start_step: int = 0, workers: int = 0) -> Iterator[dict[str, Tensor]]: ...


@dataclass
class LogEntry:
    """Means since the last entry, over all ranks: `step` (done so far), `metrics` and their names.

    Beside the objective's own scalars: `loss`, `worst_loss` (largest of the ranks), `samples_per_second` and
    `data_wait` (share of the time spent waiting for data).
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Callbacks:
    """What happens beside training; every rank calls them at the same steps."""

    on_log: Callable[[LogEntry], None] = lambda entry: None
    on_checkpoint: Callable[[int, State], None] = lambda step, state: None


def train(
    objective: Objective,
    engine: Engine,
    stream: BatchStream,
    settings: TrainingSettings,
    *,
    callbacks: Callbacks | None = None,
    resume: tuple[int, State] | None = None,
) -> State:
    """Runs steps [start, settings.steps) and returns the engine's final state.

    The order of the data, the dequantisation and the random numbers of a step depend on (seed, step) alone, so a run
    that is resumed from `resume` = (steps done, state) equals one that was never stopped.

    Raises:
        SharedError: a loss became NaN or infinite on any rank; raised before that update, on every rank.
    """
    calls = callbacks or Callbacks()
    start, state = resume if resume is not None else (0, None)
    if state is not None:
        first = next(iter(stream.loader(0)))
        engine.load(state, {name: value.to(engine.device) for name, value in first.items()})
    window = _Window(settings.batch_size)
    for step, batch in _batches(stream, start, settings, engine, on_wait=window.waited):
        torch.manual_seed(_mix(settings.seed, step, engine.rank))
        for player in objective.turns(step):
            engine.set_turn(player)
            loss, scalars = objective.loss(player, batch)
            window.add(player, loss, scalars, step)
            engine.step(player, loss, objective.players[player].learning_rate(step))
        window.steps += 1
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            calls.on_log(window.close(done))
        if done % settings.checkpoint_every == 0 and done < settings.steps:
            calls.on_checkpoint(done, engine.state())
    final = engine.state()
    calls.on_checkpoint(settings.steps, final)
    return final


def _mix(seed: int, step: int, rank: int) -> int:
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63  # torch takes 64 bits


def _batches(
    stream: BatchStream,
    start: int,
    settings: TrainingSettings,
    engine: Engine,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[tuple[int, Batch]]:
    step = start
    while step < settings.steps:
        epoch, offset = divmod(step, stream.steps_per_epoch)
        batches = iter(stream.loader(epoch, offset, settings.loader_workers))
        while step < settings.steps:
            began = time.perf_counter()
            batch = next(batches, None)
            on_wait(time.perf_counter() - began)
            if batch is None:
                break
            yield step, {name: value.to(engine.device, non_blocking=True) for name, value in batch.items()}
            step += 1


class _Window:
    """Sums between two log entries, and the guard against non-finite losses."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.began, self.wait, self.steps = time.perf_counter(), 0.0, 0
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def waited(self, seconds: float) -> None:
        self.wait += seconds

    def add(self, player: str, loss: Tensor, scalars: dict[str, Tensor], step: int) -> None:
        names = ["loss", *scalars]
        values = torch.stack([loss.detach().double(), *(value.double() for value in scalars.values())])
        mean, most = mean_and_max_over_ranks(values)
        if not bool(torch.isfinite(mean).all()):
            raise SharedError(
                f"training stopped at step {step}: the loss of player {player!r} is {float(mean[0])}; lower the "
                "learning rates and the weights of its losses, check the data, or raise a mixture's model.noise_floor"
            )
        prefix = "" if player == "model" else f"{player}_"
        for name, value in (*zip(names, mean.tolist()), ("worst_loss", float(most[0]))):
            self.sums[prefix + name] = self.sums.get(prefix + name, 0.0) + value
            self.counts[prefix + name] = self.counts.get(prefix + name, 0) + 1

    def close(self, step: int) -> LogEntry:
        seconds = max(time.perf_counter() - self.began, 1e-9)
        metrics = {name: total / self.counts[name] for name, total in self.sums.items()}
        metrics["samples_per_second"] = self.steps * self.batch_size / seconds
        metrics["data_wait"] = self.wait / seconds
        self._reset()
        return LogEntry(step, metrics)
