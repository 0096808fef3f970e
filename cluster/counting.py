"""Passes over sets of samples that are shared by Ray tasks: one partition a task, merged in the set's order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

from data.errors import StorageError, UserError, one_line
from data.partitions import Partitions
from eval.measure import View, merged
from eval.observed import Pass
from eval.stored import observe_stored

MAX_RETRIES = 3


def ray_pass(
    partitions: Partitions,
    open_view: Callable[[], View],
    progress: Callable[..., Any] = lambda *a, **b: None,
    store: str | None = None,
    cpus_per_task: float = 1,
    gpus_per_task: float = 0,
) -> Pass:
    """Passes over a set by Ray tasks; the result is that of `eval.measure.local_pass`, to the bit.

    A task that is killed, or whose storage fails, is tried again alone. Only a window of tasks is in flight, so that
    memory does not grow with the set.

    Args:
        partitions: the set.
        open_view: opens the view in a worker; a function of a module (or a partial of one), as it is sent there.
        progress: told (samples done, total) as results come in.
        store: folder where the statistics of each partition are kept (see `eval.stored`).
        cpus_per_task, gpus_per_task: what a task reserves.

    Raises:
        UserError: as `eval.measure.observe_partition`, or a task that was killed too often.
    """

    def over(observers: Mapping[str, Any]) -> Mapping[str, Any]:
        placed = {"cpus_per_task": cpus_per_task, "gpus_per_task": gpus_per_task}
        parts = ray_map(observe_stored, partitions, open_view, dict(observers), store, **placed)
        return merged(partitions, observers, parts, progress)

    return over


def ray_map(
    function: Callable[..., Any],
    partitions: Partitions,
    open_view: Callable[[], View],
    *arguments: Any,
    cpus_per_task: float = 1,
    gpus_per_task: float = 0,
) -> Iterator[Any]:
    """function(partitions, number, view, *arguments) of every partition, one Ray task each, in the set's order.

    A task is sent no more of the set than its own partition needs (`Partitions.only`).
    """
    task = ray.remote(
        num_cpus=cpus_per_task, num_gpus=gpus_per_task, max_retries=MAX_RETRIES, retry_exceptions=[StorageError]
    )(_apply)
    # Sent once, not with every task.
    whole = ray.put(partitions) if len(partitions) and partitions.only(0) is partitions else None
    sent, *shared = (ray.put(part) for part in (function, open_view, *arguments))

    def call(number: int) -> Any:
        return task.remote(number, sent, partitions.only(number) if whole is None else whole, *shared)

    window = max(2, int(2 * ray.cluster_resources().get("CPU", 1) / cpus_per_task))
    yield from in_order((functools.partial(call, number) for number in range(len(partitions))), window)


def in_order(calls: Iterator[Callable[[], Any]], window: int) -> Iterator[Any]:
    """Results of remote calls in the order of the calls, of which at most `window` are in flight."""
    pending: list[Any] = []
    for call in calls:
        pending.append(call())
        if len(pending) >= window:
            yield result_of(pending.pop(0))
    while pending:
        yield result_of(pending.pop(0))


def result_of(reference: Any, retries: int = MAX_RETRIES) -> Any:
    """A task's result; a user's fault in it is raised as itself.

    Raises:
        UserError: what the task raised as one, or that it was killed more than `retries` times.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise error.cause from error  # Ray's own text begins with the place, and not with what happened
    except ray.exceptions.WorkerCrashedError as error:
        raise UserError(
            f"a task was killed more than {retries} times ({one_line(error)}): give it more memory, or run the same "
            "command again to go on"
        ) from error


def _apply(
    number: int, function: Callable[..., Any], partitions: Partitions, open_view: Callable[[], View], *arguments: Any
) -> Any:
    return function(partitions, number, open_view(), *arguments)
