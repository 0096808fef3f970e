"""The model as MLflow serves it. This file goes into the registered model and runs on machines without manymodes.

It imports only mlflow, numpy, torch and the standard library. The network's own source travels beside it as an
artifact and is loaded from its path under a private module name: nothing is put on the consumer's `sys.path`.

`predict(x, params={"task": ...})`, of what the network can do (the first is what it does unasked):
    log_prob          -> [n] float64 array, nats per sample
    responsibilities  -> [n, n_components] float32 array
    probabilities     -> [n, n_classes] float32 array, of a classifier
    features          -> [n, d] float32 array, a classifier's last hidden layer
    sample            -> [n, ...shape] float32 array; `n` and `seed` as parameters, x is ignored
"""

import hashlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch

BATCH = 1024
TASKS = ("log_prob", "responsibilities", "probabilities", "features", "sample")


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, read without the safetensors package.

    The format: a little-endian uint64 length, a JSON header (name -> dtype, shape, byte offsets), then the bytes.
    """
    types = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), memoryview(raw)[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        values = np.frombuffer(body[start:stop], types[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = torch.from_numpy(values.copy())
    return tensors


def load_network(source: str) -> Any:
    """Executes the network's source file under a name made from its content, and returns its model class."""
    text = Path(source).read_bytes()
    name = "manymodes_network_" + hashlib.sha256(text).hexdigest()[:16]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source)
        if spec is None or spec.loader is None:
            raise ImportError(f"{source} cannot be loaded as a module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name].MODEL


class ServedModel(mlflow.pyfunc.PythonModel):
    """A model behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        document = json.loads(Path(context.artifacts["model"]).read_text())
        self.data: dict[str, Any] = document["data"]
        self.shape = tuple(document["data"]["shape"])
        self.net = load_network(context.artifacts["network"])(**document["arguments"]).eval()
        self.net.load_state_dict(read_safetensors(context.artifacts["weights"]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        settings = params or {}
        tasks = [name for name in TASKS if hasattr(self.net, name)]
        task = settings.get("task") or tasks[0]
        if task not in tasks:
            raise ValueError(f"unknown task {task!r}: use {', '.join(tasks[:-1])} or {tasks[-1]}")
        with torch.inference_mode():
            if task == "sample":
                return self._sample(int(settings.get("n", 1)), int(settings.get("seed", 0)))
            x = np.array(model_input, np.float32).reshape(-1, math.prod(self.shape))
            if not np.isfinite(x).all():
                raise ValueError("the input holds NaN or infinite values")
            rows = torch.from_numpy(x if len(x) else np.zeros((1, x.shape[1]), np.float32))
            result = torch.cat([getattr(self.net, task)(part) for part in rows.split(BATCH)])[: len(x)]
            return result.double().numpy() if task == "log_prob" else result.numpy()

    def _sample(self, n: int, seed: int) -> np.ndarray:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        samples = self.net.sample(n, torch.Generator().manual_seed(seed))
        return samples.reshape(n, *self.shape).numpy()


mlflow.models.set_model(ServedModel())
