"""The data-parallel training job: Ray Train starts the workers, watches them, and restarts them from checkpoints."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from typing import Any

import ray
import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from cluster.placement import worker_resources
from cluster.recipe import Recipe, ScalingSettings
from data import storage
from data.errors import SharedError, StorageError, UserError, one_line
from data.manifest import Manifest, load_manifest
from trainer.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint, save_model
from trainer.engines import State
from trainer.fit import Fit, trained_tensors
from trainer.loop import Callbacks, LogEntry
from trainer.settings import TrainingSettings
from trainer.tracking import RunLogger

# Times that Ray Train tries to find room for the workers, at the least.
_STARTS = 4
# An elastic job learns from a try that a node is gone, which Ray notices after some 13 s.
_ELASTIC_TRY_SECONDS = 10


def run_training(
    recipe: Recipe,
    manifest: Manifest,
    training: TrainingSettings,
    *,
    folder: str,
    job: str,
    start: str | None = None,
    tracking_uri: str | None,
    run_id: str | None,
    prefix: str = "train",
    board: Any,
) -> dict[str, Any]:
    """Trains a model over Ray Train's workers and leaves it in `folder`/model.

    Called again with the same `job` and `folder`, it goes on from the last checkpoint.

    Args:
        recipe, manifest: what and on which data.
        training: how; the recipe's own for the (root) mixture.
        folder: for checkpoints and the model.
        job: name of the job, part of the checkpoints' place.
        start: folder of the model to start from; None initialises the recipe's.
        tracking_uri, run_id: MLflow; metrics are called `prefix`/...
        board: see `remote_progress`.

    Returns:
        Rank 0's closing metrics: `loss`, the objective's own (`log_likelihood`, nats per sample, or `accuracy`),
        `samples_per_second`, `history`, the (step, loss) pairs that were logged, and `ray_seconds`, what starting and
        stopping the workers took.

    Raises:
        UserError: the workers failed for a reason that the user can mend, or Ray lost the job.
        RuntimeError: they failed otherwise, more often than scaling.max_failures allows.
    """
    scaling = recipe.scaling
    resources = worker_resources(scaling)
    starts = max(_STARTS, scaling.start_timeout_seconds // _ELASTIC_TRY_SECONDS if scaling.min_workers else 0)
    place, filesystem = _checkpoint_store(storage.join(folder, "checkpoints"))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "training": training.model_dump(mode="json"),
            "shards": manifest.base,
            "folder": folder,
            "start": start,
            "prefix": prefix,
            "tracking_uri": tracking_uri,
            "run_id": run_id,
            "board": board,
        },
        torch_config=TorchConfig(
            backend="nccl" if scaling.gpus_per_worker else "gloo", timeout_s=scaling.timeout_seconds
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(scaling.min_workers, scaling.workers) if scaling.min_workers else scaling.workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
            placement_strategy=scaling.placement.upper(),
        ),
        run_config=ray.train.RunConfig(
            name=job,
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=starts - 1
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": _environment(scaling)},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(scaling.start_timeout_seconds / starts)
    if not _room(resources, scaling.min_workers or scaling.workers):
        _post(board, 0, "waiting for room on the cluster")
    began = time.time()
    handler = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except SystemExit as error:  # what Ray Train makes of Ctrl-C
        raise KeyboardInterrupt from error
    except ray.train.WorkerGroupError as error:
        raise _cause(error.worker_failures) from error
    except ray.train.ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        raise UserError(
            f"no room for the workers on the cluster within {scaling.start_timeout_seconds} s: other work holds it, or "
            "no nodes came; run the same command again later, or set scaling.start_timeout_seconds higher"
        ) from error
    except ray.exceptions.RayError as error:
        raise UserError(
            f"the training job ended: {one_line(error)}; run the same command again to go on from the last checkpoint"
        ) from error
    finally:
        # Ray Train takes Ctrl-C for itself and does not give it back.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
    outcome = dict(result.return_value)
    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    outcome["ray_seconds"] = (outcome.pop("started") - began) + (time.time() - outcome.pop("ended"))
    return outcome


def _environment(scaling: ScalingSettings) -> dict[str, str]:
    """Environment variables of the workers, which are read when libraries are loaded."""
    found = {} if scaling.gpus_per_worker else {"DS_ACCELERATOR": "cpu"}
    if scaling.threads_per_worker:
        found |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(scaling.threads_per_worker))
    return found


def _room(resources: dict[str, float], workers: int) -> bool:
    """Whether the cluster has so much free at this moment."""
    free = ray.available_resources()
    return all(free.get(name, 0) >= each * workers for name, each in resources.items())


def _checkpoint_store(url: str) -> tuple[str, Any]:
    """What Ray Train takes for a folder: a path, or the file system of a URL and the path in it."""
    if storage.is_local(url):
        return url, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = storage.filesystem(url)
    return path, PyFileSystem(FSSpecHandler(filesystem))


def _cause(failures: dict[int, BaseException]) -> Exception:
    """The workers' own reason, if a user can act on it; else a line that names the rank."""
    for failure in failures.values():
        inner: BaseException | None = failure
        while inner is not None:
            if isinstance(inner, UserError):
                return inner
            inner = getattr(inner, "cause", None) or inner.__cause__
    rank, first = next(iter(failures.items()))
    last_line = (str(first).strip().splitlines() or [type(first).__name__])[-1]
    return RuntimeError(f"training worker {rank} failed: {last_line}\n{first}")


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """One rank. A fault that only the user can mend ends the job, instead of being tried again in vain.

    Where all ranks met it together it is returned. Where one met it, the others may wait for it in a collective:
    it is noted and raised, Ray starts the group again, and the new group finds the note and ends.
    """
    started, board = time.time(), config["board"]
    noted = ray.get(board.failure.remote())
    if noted:
        return {"user_error": noted}
    try:
        return {**_train_rank(config), "started": started, "ended": time.time()}
    except SharedError as error:
        return {"user_error": str(error)}
    except StorageError:
        raise  # the store may be back at the next try
    except UserError as error:
        ray.get(board.fail.remote(str(error)))
        raise


def _train_rank(config: dict[str, Any]) -> dict[str, Any]:
    """Model and data, the run itself; rank 0 also reports, records and writes."""
    recipe = Recipe.model_validate(config["recipe"])
    settings = TrainingSettings.model_validate(config["training"])
    manifest = load_manifest(config["shards"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    model = load_model(config["start"])[0].train() if config["start"] else _untrained(recipe, manifest)
    fit = Fit(
        model,
        manifest,
        settings,
        rank=rank,
        world_size=context.get_world_size(),
        lanes=settings.lanes or recipe.scaling.lanes,
        device=ray.train.torch.get_device() if recipe.scaling.gpus_per_worker else None,
        objective=recipe.model.objective,
    )
    found = _latest_checkpoint(fit.order())
    if found is None and not config["start"]:
        _initialise_on_rank_zero(model, recipe, manifest, rank, config["board"])

    logger = RunLogger(config["tracking_uri"], config["run_id"]) if rank == 0 else RunLogger(None, None)
    history: list[LogEntry] = []

    def on_log(entry: LogEntry) -> None:
        history.append(entry)
        logger.metrics({f"{config['prefix']}/{name}": value for name, value in entry.metrics.items()}, entry.step)
        if rank == 0:
            rate = entry.metrics["samples_per_second"]
            _post(config["board"], entry.step, f"loss {entry.metrics['loss']:.3f}  {rate:,.0f} samples/s")

    def on_checkpoint(step: int, state: State) -> None:
        metrics = {"step": step}
        if rank != 0:
            ray.train.report(metrics)
            return
        logger.flush()  # what was logged up to a checkpoint is never lost
        with tempfile.TemporaryDirectory() as folder:
            details = {"stream": fit.order(), "recipe": config["recipe"], "history": _plain(history)}
            save_checkpoint(folder, step, state, details)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step_{step:08d}")

    if found is not None:
        _post(config["board"], found.step, f"resumed at step {found.step}")
        history = [LogEntry(entry["step"], entry["metrics"]) for entry in found.details["history"]]
    state = fit.run(Callbacks(on_log, on_checkpoint), (found.step, found.state) if found else None)
    logger.flush()
    if rank == 0:
        final, tensors = type(model)(**model.config), trained_tensors(state)
        final.load_state_dict({name: tensors[name] for name in final.state_dict()})
        dequantised = settings.dequantises(manifest.levels)
        save_model(
            storage.join(config["folder"], "model"), final, recipe.model.family, manifest, dequantised=dequantised
        )
    last = history[-1].metrics if history else {}
    return {**last, "history": [(e["step"], e["metrics"].get("loss", 0.0)) for e in _plain(history)]}


def _untrained(recipe: Recipe, manifest: Manifest) -> Any:
    """The recipe's model before training, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        return recipe.model.build(manifest)


def _initialise_on_rank_zero(model: Any, recipe: Recipe, manifest: Manifest, rank: int, board: Any) -> None:
    """Rank 0 initialises (the engine then broadcasts); a failure there must reach the ranks that wait for it."""
    problem = None
    if rank == 0:
        by = f" by {recipe.initialisation.method}" if "initialisation" in recipe.model.sections else ""
        _post(board, 0, f"starting point{by}")
        try:
            recipe.model.initialise(model, manifest, recipe.training, recipe.initialisation)
        except UserError as error:
            problem = str(error)
    problem = broadcast_from_rank_zero(problem)
    if problem:
        raise SharedError(problem)


def _latest_checkpoint(stream: dict[str, Any]) -> Checkpoint | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return load_checkpoint(folder, stream)


def _plain(history: list[LogEntry]) -> list[dict[str, Any]]:
    return [{"step": e.step, "metrics": {k: float(v) for k, v in e.metrics.items()}} for e in history]


def _post(board: Any, done: int, text: str) -> None:
    board.post.remote({"done": done, "text": text})
