"""The model as MLflow serves it. This file goes into the registered model and runs on machines without manymodes.

It imports only mlflow, numpy, torch and the standard library. The network's own source files travel beside it as an
artifact and become a package of a private name: nothing is put on the consumer's `sys.path`.

`predict(x, params={"task": ...})`, of what the model can do (the first is what it does unasked). x is an array or a
data frame of samples, [n, d] or [n, *shape], any n from 0 on; what comes back is an array:

    log_prob          -> [n] float64, nats per sample
    probabilities     -> [n, n_classes] float32, of a classifier
    responsibilities  -> [n, n_components] float32
    features          -> [n, n_hidden] float32, a classifier's last hidden layer
    encode            -> [n, 1 + l] float32 of a mixture: the most probable component's number, then its factors'
                         posterior means; [n, l] of another model: its code
    sample            -> [n, *shape] float32; parameters `n` and `seed`, x is ignored
    inpaint           -> [n, *shape] float32. Hidden features are NaN in x, or false in `mask` (d values for all
                         samples alike, or n·d). `mode`: "map", the conditional mean in the most probable component;
                         "mean", the conditional mean; "sample", draws: [n, draws, *shape] with the parameters `n`
                         (draws of each sample), `seed`, and `noise` (draw the noise of the features, too)
    decode            -> [n, *shape] float32, for x as `encode` gives it: the sample without its noise; of a generator
                         that encodes nothing, for points [n, l] of its noise

Every result is a function of x, the parameters and the seed.
"""

import functools
import hashlib
import importlib
import json
import math
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from torch import Tensor

BATCH = 1024
# The parameters beside `task`, by what they are unasked.
DEFAULTS: dict[str, Any] = {"n": 1, "seed": 0, "mode": "map", "noise": False, "mask": []}
_MODES = ("map", "mean", "sample")
# A model has a task where it has one of these methods.
_METHODS = {
    "log_prob": ("log_prob",),
    "probabilities": ("probabilities",),
    "responsibilities": ("responsibilities",),
    "features": ("features",),
    "encode": ("latent_posterior", "encode"),
    "sample": ("sample",),
    "inpaint": ("inpaint",),
    "decode": ("decode",),
}


def tasks_of(model: Any) -> list[str]:
    """What a model, or a class of models, can be asked; the first is what it does unasked."""
    return [task for task, methods in _METHODS.items() if any(hasattr(model, name) for name in methods)]


def read_safetensors(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read without the safetensors package.

    The format: a little-endian uint64 length, a JSON header (name -> dtype, shape, byte offsets), then the bytes.
    """
    dtypes = {
        **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BOOL": np.bool_, "U8": np.uint8},
        **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    }
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), memoryview(raw)[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        values = np.frombuffer(body[start:stop], dtypes[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = torch.from_numpy(values.copy())
    return tensors


def load_network(folder: str, family: str) -> Any:
    """Makes the source files a package of a name that is made from their content; returns the family's class."""
    files = sorted(Path(folder).glob("*.py"))
    digest = hashlib.sha256(b"\0".join(part for file in files for part in (file.name.encode(), file.read_bytes())))
    package = "manymodes_network_" + digest.hexdigest()[:16]
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = [folder]
        sys.modules[package] = module
        try:
            for file in files:  # all of them now: the folder may be gone when a method imports
                importlib.import_module(f"{package}.{file.stem}")
        except BaseException:
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]
            raise
    return sys.modules[f"{package}.{family}"].MODEL


class ServedModel(mlflow.pyfunc.PythonModel):
    """A model behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        document = json.loads(Path(context.artifacts["model"]).read_text())
        network = load_network(context.artifacts["sources"], document["family"])(**document["arguments"])
        network.load_state_dict(read_safetensors(context.artifacts["weights"]))
        self.hold(network, document["data"])

    def hold(self, network: Any, data: Mapping[str, Any]) -> None:
        """Takes a network with its weights; `data` says what it was trained on."""
        self.net, self.data, self.shape = network.eval(), dict(data), tuple(data["shape"])
        self.tasks = tasks_of(network)
        if callable(getattr(network, "precision", None)):  # of a mixture; its parameters do not change any more
            network.precision = functools.cache(network.precision)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        settings = {**DEFAULTS, **(params or {})}
        task = settings.get("task") or self.tasks[0]
        if task not in self.tasks:
            raise ValueError(f"unknown task {task!r}: this model can do {', '.join(self.tasks)}")
        with torch.inference_mode():
            if task == "sample":
                return self._sample(_count(settings["n"]), int(settings["seed"]))
            if task == "decode":
                return self._decode(_array(model_input))
            x = self._rows(_array(model_input))
            if task == "inpaint":
                return self._inpaint(x, settings)
            if not np.isfinite(x).all():
                raise ValueError("the input holds NaN or infinite values; only inpaint takes NaN, for what is hidden")
            if task == "encode":
                return self._over_batches(self._encode, x)
            result = self._over_batches(getattr(self.net, task), x)
            return result.astype(np.float64) if task == "log_prob" else result

    def _rows(self, x: np.ndarray) -> np.ndarray:
        """Samples [n, d]."""
        width = math.prod(self.shape)
        if x.ndim == 1 and x.size == width:
            return x.reshape(1, width)
        if x.size == 0 and (x.ndim < 2 or len(x) == 0):
            return np.zeros((0, width), np.float32)
        if x.ndim < 2 or math.prod(x.shape[1:]) != width:
            raise ValueError(f"the input has the shape {list(x.shape)}: give [n, {width}] or [n, {str(self.shape)[1:]}")
        return x.reshape(len(x), width)

    def _over_batches(self, function: Callable[[Tensor], Tensor], x: np.ndarray) -> np.ndarray:
        # An empty input goes through as one sample of zeros: its result has the shape of the others'.
        rows = torch.from_numpy(x if len(x) else np.zeros((1, x.shape[1]), np.float32))
        return torch.cat([function(part) for part in rows.split(BATCH)])[: len(x)].numpy()

    def _sample(self, n: int, seed: int) -> np.ndarray:
        if n == 0:
            return np.zeros((0, *self.shape), np.float32)
        samples = self.net.sample(n, torch.Generator().manual_seed(seed))
        return samples.reshape(n, *self.shape).numpy()

    def _inpaint(self, x: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        mode, draws = settings["mode"], _count(settings["n"])
        if mode not in _MODES:
            raise ValueError(f"unknown mode {mode!r}: use {', '.join(_MODES)}")
        observed = ~np.isnan(x)
        mask = np.asarray(settings["mask"], bool).reshape(-1)
        if mask.size:
            if mask.size not in (x.shape[1], x.size):
                raise ValueError(f"the mask has {mask.size} values: give {x.shape[1]}, or {x.size} (a row per sample)")
            observed = observed & mask.reshape(-1, x.shape[1])
        if not np.isfinite(x[observed]).all():
            raise ValueError("the input holds infinite values")
        if len(x) == 0 or (mode == "sample" and draws == 0):
            return np.zeros((len(x), *((draws,) if mode == "sample" else ()), *self.shape), np.float32)
        rows, seen = torch.from_numpy(np.where(observed, x, np.float32(0))), torch.from_numpy(observed)
        if mode != "sample":
            return self.net.inpaint(rows, seen, mode=mode).reshape(len(x), *self.shape).numpy()
        rows, seen = rows.repeat_interleave(draws, 0), seen.repeat_interleave(draws, 0)
        generator = torch.Generator().manual_seed(int(settings["seed"]))
        found = self.net.inpaint(rows, seen, mode=mode, noise=bool(settings["noise"]), generator=generator)
        return found.reshape(len(x), draws, *self.shape).numpy()

    def _encode(self, x: Tensor) -> Tensor:
        if not hasattr(self.net, "latent_posterior"):
            return self.net.encode(x)
        component = self.net.map_component(x)
        mean, _ = self.net.latent_posterior(x, component)
        return torch.cat([component[:, None].to(mean.dtype), mean], 1)

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        if codes.size == 0:
            return np.zeros((0, *self.shape), np.float32)
        if codes.ndim != 2 or not np.isfinite(codes).all():
            raise ValueError("decode takes finite codes [n, l], as encode gives them")
        z, component = torch.from_numpy(codes), None
        if hasattr(self.net, "latent_posterior"):
            k, width = self.net.n_components, 1 + self.net.n_factors
            if codes.shape[1] != width:
                raise ValueError(f"codes have {codes.shape[1]} columns: give {width}, the component and its factors")
            if not np.isin(codes[:, 0], np.arange(k)).all():
                raise ValueError(f"the first column of codes is a component, 0 to {k - 1}")
            component, z = z[:, 0].long(), z[:, 1:]
        parts = [z.split(BATCH)] if component is None else [z.split(BATCH), component.split(BATCH)]
        found = torch.cat([self.net.decode(*part) for part in zip(*parts)])
        return found.reshape(len(codes), *self.shape).numpy()


def _array(values: Any) -> np.ndarray:
    """Arrays, data frames and nested lists as float32, in memory of our own; None is NaN."""
    return np.array(values, np.float32, order="C")


def _count(n: Any) -> int:
    if int(n) < 0:
        raise ValueError(f"n must not be negative, got {n}")
    return int(n)


mlflow.models.set_model(ServedModel())
