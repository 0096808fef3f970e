"""What a request asks of a model: read from JSON, checked before it is queued, answered together with others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from data.limits import MAX_SEED

# The route of a task, and the name of its result in the reply.
ROUTES = {"/sample": ("sample", "samples"), "/score": ("log_prob", "log_prob"), "/inpaint": ("inpaint", "completions")}
_FIELDS = {
    "sample": {"n", "seed"},
    "log_prob": {"inputs"},
    "inpaint": {"inputs", "mask", "mode", "n", "seed", "noise"},
}
_MODES = ("map", "mean", "sample")


class Refused(Exception):
    """A request that is answered by a status of 4xx and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Of one request: bytes of its body, samples that it brings or draws, and numbers in its reply."""

    body_bytes: int = 16 << 20
    rows: int = 10_000
    values: int = 4_000_000


@dataclass(frozen=True)
class Job:
    """One request, checked: samples `x` [n, d] (NaN where hidden) and the parameters of `ServedModel.predict`.

    A job without a `seed` takes whatever is drawn.
    """

    task: str
    x: np.ndarray
    params: Mapping[str, Any]
    seed: int | None = None


def read_job(task: str, body: bytes, shape: tuple[int, ...], limits: Limits) -> Job:
    """Reads the JSON body of a request to a model of samples `[*shape]`.

    Raises:
        Refused: 400 for what is malformed, 413 for too much of it.
    """
    document = _object(body)
    unknown = sorted(set(document) - _FIELDS[task])
    if unknown:
        raise Refused(400, f"unknown field {unknown[0]!r}: known are {', '.join(sorted(_FIELDS[task]))}")
    width = math.prod(shape)
    mode = document.get("mode", "map")
    if mode not in _MODES:
        raise Refused(400, f"mode must be one of {', '.join(_MODES)}")
    seed = None if document.get("seed") is None else _whole(document["seed"], "seed", 0, MAX_SEED)
    n = _whole(document.get("n", 1), "n", 1, None)
    x = np.zeros((0, width), np.float32) if task == "sample" else _rows(document, width, shape)
    if task == "inpaint":
        x = _hidden(x, document.get("mask"))
    elif np.isnan(x).any():
        raise Refused(400, "inputs hold null: only /inpaint takes it, for what is hidden")
    rows = n if task == "sample" else len(x)
    if task == "inpaint" and mode == "sample":
        rows = n * max(1, len(x))  # the model reads n of no sample, too
    if rows > limits.rows or (task != "log_prob" and rows * width > limits.values):
        most = limits.rows if task == "log_prob" else min(limits.rows, max(1, limits.values // width))
        raise Refused(413, f"{rows} samples in one request: ask for at most {most} at a time")
    noise = document.get("noise", False)
    if not isinstance(noise, bool):
        raise Refused(400, "noise must be true or false")
    params: dict[str, Any] = {"task": task}
    if task == "sample":
        params["n"] = n
    if task == "inpaint":
        params |= {"mode": mode, **({"n": n, "noise": noise} if mode == "sample" else {})}
    return Job(task, x, params, seed)


def _object(body: bytes) -> dict[str, Any]:
    def constant(name: str) -> NoReturn:
        raise Refused(400, f"{name} is no JSON: write null for what is hidden")

    try:
        document = json.loads(body or b"{}", parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is no JSON") from error
    if not isinstance(document, dict):
        raise Refused(400, "the body must be a JSON object")
    return document


def _whole(value: Any, name: str, least: int, most: int | None) -> int:
    if type(value) is not int or value < least or (most is not None and value > most):
        raise Refused(400, f"{name} must be a whole number from {least}" + ("" if most is None else f" to {most}"))
    return value


def _rows(document: Mapping[str, Any], width: int, shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(document.get("inputs"), list):
        raise Refused(400, "inputs must be a list of samples")
    try:
        found = np.array(document["inputs"])
        if found.dtype.kind == "O" and not all(value is None or type(value) in (int, float) for value in found.flat):
            raise ValueError
        if found.dtype.kind not in "iufO":
            raise ValueError
        with np.errstate(over="ignore"):
            x = found.astype(np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(400, "inputs must be samples of one length, of numbers (null where hidden)") from error
    if x.size == 0 and len(x) == 0:
        return np.zeros((0, width), np.float32)
    if x.ndim < 2 or x.shape[1:] not in ((width,), shape):
        whole = ", ".join(map(str, shape))
        raise Refused(400, f"inputs have the shape {list(x.shape)}: give [n, {width}] or [n, {whole}]")
    if np.isinf(x).any():
        raise Refused(400, "inputs hold numbers that are too large")
    return x.reshape(len(x), width)


def _hidden(x: np.ndarray, mask: Any) -> np.ndarray:
    """x, NaN where the mask (one for all samples, or one for each) is false."""
    if mask is None:
        return x
    try:
        observed = np.array(mask)
    except ValueError as error:
        raise Refused(400, "mask must be booleans") from error
    if observed.dtype != bool or observed.size not in (x.shape[1], x.size):
        raise Refused(400, f"mask must be {x.shape[1]} booleans, or as many for each sample: true where it is known")
    return np.where(observed.reshape(-1, x.shape[1]), x, np.float32(np.nan))


def answer(served: Any, jobs: Sequence[Job], seed: int) -> list[np.ndarray | Exception]:
    """The result of every job; those that do not depend on a seed of their own go through the model together.

    Args:
        served: a `deploy.served_model.ServedModel`.
        jobs: as they came.
        seed: of what is drawn for jobs that named none.
    """
    together: dict[tuple[Any, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        chance = job.task == "sample" or job.params.get("mode") == "sample"
        alone = chance and (job.seed is not None or job.task != "sample")
        key = (i,) if alone else (job.task, job.params.get("mode"))
        together.setdefault(key, []).append(i)
    results: list[np.ndarray | Exception] = [np.zeros(0)] * len(jobs)
    for number, group in enumerate(together.values()):
        first = jobs[group[0]]
        own = (seed + number) % MAX_SEED if first.seed is None else first.seed
        params = {**first.params, "seed": own}
        sizes = [len(jobs[i].x) for i in group]
        if first.task == "sample":
            sizes = [jobs[i].params["n"] for i in group]
            params["n"] = sum(sizes)
        try:
            found = served.predict(None, np.concatenate([jobs[i].x for i in group]), params)
        except Exception as error:
            for i in group:
                results[i] = error
            continue
        for i, part in zip(group, np.split(found, np.cumsum(sizes)[:-1]), strict=True):
            results[i] = part
    return results


def reply(name: str, values: np.ndarray) -> bytes:
    """The JSON object {name: values}; null for what is not finite."""
    finite = np.isfinite(values)
    if not finite.all():
        values = values.astype(object)
        values[~finite] = None
    return json.dumps({name: values.tolist()}, separators=(",", ":")).encode()
