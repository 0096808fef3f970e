"""What turns a loss into a synchronised update: data-parallel torch (DDP) or DeepSpeed (ZeRO 0 to 3).

Both engines write and read one state: for each player its float32 parameters, buffers and optimiser moments under
plain names. A checkpoint therefore does not know the engine, the ZeRO stage or the number of workers that made it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.errors import SharedError
from trainer.objectives import Batch, Objective, Player
from trainer.players import AVERAGE
from trainer.settings import TrainingSettings

State = dict[str, Tensor]


class Engine(Protocol):
    """Gradient steps of an objective's players over all workers."""

    rank: int
    world_size: int
    device: torch.device

    def attach(self, objective: Objective) -> None:
        """Moves the players to the device, gives every rank rank 0's parameters, and wraps the networks."""
        ...

    def set_turn(self, player: str) -> None:
        """Puts into `objective.networks` what this player's loss may call."""
        ...

    def step(self, player: str, loss: Tensor, learning_rate: float) -> None:
        """Backward, gradient synchronisation, clipping and the optimiser's step."""
        ...

    def state(self) -> State:
        """Parameters, buffers and moments, complete on every rank (a collective call)."""
        ...

    def load(self, state: State, batch: Batch) -> None:
        """Restores `state()`; `batch` is for engines that only make their moments in a first step."""
        ...


def make_engine(settings: TrainingSettings, device: torch.device | None = None) -> Engine:
    """The engine that the settings name, for this process' rank in the default process group (or for one process)."""
    place = device or torch.device("cpu")
    return DeepSpeedEngine(settings, place) if settings.engine == "deepspeed" else DDPEngine(place)


def mean_and_max_over_ranks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and maximum over the ranks of a small vector, by one collective."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values, values
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    table = torch.stack(gathered)
    return table.mean(0), table.amax(0)


def broadcast_module(module: nn.Module) -> None:
    """Gives every rank rank 0's parameters and buffers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)


class _Base:
    """What both engines share: ranks, the player's turn, broadcast of the starting point."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.objective: Objective
        self.wrapped: dict[str, Callable[..., Any]] = {}

    def _start(self, objective: Objective) -> None:
        self.objective = objective
        for player in objective.players.values():
            broadcast_module(player.module.to(self.device))

    def set_turn(self, player: str) -> None:
        for name, other in self.objective.players.items():
            mine = name == player
            other.module.requires_grad_(mine)
            self.objective.networks[name] = self.wrapped[name] if mine else other.module


class DDPEngine(_Base):
    """DistributedDataParallel; the bare module where there is one worker."""

    def attach(self, objective: Objective) -> None:
        self._start(objective)
        for name, player in objective.players.items():
            self.wrapped[name] = player.module
            if self.world_size > 1:
                self.wrapped[name] = nn.parallel.DistributedDataParallel(
                    player.module, gradient_as_bucket_view=True, broadcast_buffers=False
                )

    def step(self, player: str, loss: Tensor, learning_rate: float) -> None:
        p = self.objective.players[player]
        for group in p.optimiser.param_groups:
            group["lr"] = learning_rate
        p.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if p.gradient_clip is not None:
            nn.utils.clip_grad_norm_(p.module.parameters(), p.gradient_clip)
        p.optimiser.step()

    def state(self) -> State:
        out: State = {}
        for name, player in self.objective.players.items():
            _put_module(out, name, player.module)
            for key, parameter in player.module.named_parameters():
                for field, value in player.optimiser.state.get(parameter, {}).items():
                    if value is not None:
                        out[f"{name}.optimiser.{key}.{field}"] = torch.as_tensor(value).detach().cpu().clone()
        return out

    def load(self, state: State, batch: Batch) -> None:
        for name, player in self.objective.players.items():
            _load_module(state, name, player.module)
            for key, parameter in player.module.named_parameters():
                moments = _moments(state, name, key)
                if moments:
                    # Adam keeps its step counter on the CPU, the moments beside the parameter.
                    player.optimiser.state[parameter] = {
                        field: value.clone() if value.ndim == 0 else value.clone().to(parameter.device)
                        for field, value in moments.items()
                    }


class DeepSpeedEngine(_Base):
    """DeepSpeed with ZeRO stage 0 to 3 around the players' own torch optimisers."""

    def __init__(self, settings: TrainingSettings, device: torch.device) -> None:
        super().__init__(device)
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read once, at import
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        # Without this the first start on CPU compiles a C++ extension, for a minute or in vain.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            _single_process_group()
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deepspeed, self.stage = deepspeed, settings.zero_stage
        self.batch = settings.batch_size
        self.engines: dict[str, Any] = {}

    def attach(self, objective: Objective) -> None:
        self._start(objective)
        for name, player in objective.players.items():
            if self.stage and not all(parameter.numel() for parameter in player.module.parameters()):
                raise SharedError(
                    "DeepSpeed's ZeRO cannot train a model with an empty parameter (model.n_factors=0): set "
                    "training.zero_stage=0"
                )
            config = {
                "train_micro_batch_size_per_gpu": self.batch // self.world_size,
                "gradient_clipping": player.gradient_clip or 0.0,  # DeepSpeed's own default clips at 1
                "zero_optimization": {"stage": self.stage},
                "zero_allow_untested_optimizer": True,
            }
            engine = self.deepspeed.initialize(model=player.module, optimizer=player.optimiser, config=config)[0]
            self.engines[name] = self.wrapped[name] = engine

    def step(self, player: str, loss: Tensor, learning_rate: float) -> None:
        engine = self.engines[player]
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        engine.backward(loss)
        engine.step()

    def _torch_states(self, name: str) -> dict[Any, dict[str, Any]]:
        optimiser = self.engines[name].optimizer
        return getattr(optimiser, "optimizer", optimiser).state

    def state(self) -> State:
        out: State = {}
        for name, player in self.objective.players.items():
            with self._gathered(player):
                _put_module(out, name, player.module)
            states = self._torch_states(name)
            fields = {f: v for s in states.values() for f, v in s.items() if isinstance(v, Tensor)}
            for key, parameter in player.module.named_parameters():
                if self.stage > 0:
                    out[f"{name}.module.{key}"] = self._utils.safe_get_full_fp32_param(parameter).cpu().clone()
                for field, example in fields.items():
                    if example.ndim == 0:
                        value = example
                    elif self.stage > 0:
                        value = self._utils.safe_get_full_optimizer_state(parameter, field)
                    else:
                        value = states[parameter][field]
                    out[f"{name}.optimiser.{key}.{field}"] = value.detach().cpu().clone()
        return out

    def load(self, state: State, batch: Batch) -> None:
        for name, player in self.objective.players.items():
            self.set_turn(name)
            # ZeRO makes its moments lazily: one step, whose every effect is overwritten below.
            self.step(name, self.objective.loss(name, batch)[0], 0.0)
            with self._gathered(player, write=True):
                _load_module(state, name, player.module)
            states = self._torch_states(name)
            for moment in (value for moments in states.values() for value in moments.values()):
                if isinstance(moment, Tensor):
                    moment.zero_()  # of a player that had not moved yet
            for key, parameter in player.module.named_parameters():
                own = state[f"{name}.module.{key}"]
                if self.stage > 0:
                    self._set_sharded(parameter, own)
                # What has not moved yet is its own average.
                held = states.values() if self.stage > 0 else [states.get(parameter, {})]
                averages = any(AVERAGE in moments for moments in held)
                found = ({AVERAGE: own} if averages else {}) | _moments(state, name, key)
                for field, value in found.items():
                    if value.ndim == 0:
                        for moments in states.values():
                            moments[field] = value.clone()
                    elif self.stage > 0:
                        self._set_sharded(parameter, value, field)
                    else:
                        states[parameter][field].copy_(value)

    def _set_sharded(self, parameter: Any, value: Tensor, *field: str) -> None:
        """Sets what ZeRO trains in place of a parameter, or that parameter's moment."""
        value = value.to(self.device)
        if self.stage == 3:  # its own setter refuses values that do not divide evenly among the ranks
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
            mine = padded[size * self.rank : size * (self.rank + 1)]
            setter = self._utils.safe_set_local_optimizer_state if field else self._utils.safe_set_local_fp32_param
            setter(parameter, mine, *field)
        elif field:
            self._utils.safe_set_full_optimizer_state(parameter, value, *field)
        else:
            self._utils.safe_set_full_fp32_param(parameter, value)

    @property
    def _utils(self) -> Any:
        return self.deepspeed.utils

    def _gathered(self, player: Player, *, write: bool = False) -> contextlib.AbstractContextManager[Any]:
        if self.stage < 3:
            return contextlib.nullcontext()
        parameters = list(player.module.parameters())
        return self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


def _put_module(out: State, name: str, module: nn.Module) -> None:
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        out[f"{name}.module.{key}"] = value.detach().cpu().clone()


@torch.no_grad()
def _load_module(state: State, name: str, module: nn.Module) -> None:
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        value.copy_(state[f"{name}.module.{key}"])


def _moments(state: State, name: str, key: str) -> State:
    prefix = f"{name}.optimiser.{key}."
    return {full.removeprefix(prefix): value for full, value in state.items() if full.startswith(prefix)}


def _single_process_group() -> None:
    """A process group of one, over a store in this process' memory: DeepSpeed insists on a group."""
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(key, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
