"""Models in and out of the MLflow registry."""

from __future__ import annotations

import importlib.util
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import storage
from data.errors import UserError, one_line
from trainer.tracking import mlflow_errors

# MLflow finds a code model through a process-wide global: two loads at once could return one model twice.
_LOADING = threading.Lock()


@dataclass(frozen=True)
class Registered:
    """A registered model version: its number and the URI under which its alias is loaded."""

    version: int
    uri: str


def register_model(
    folder: str, *, name: str, alias: str, tracking_uri: str, run_id: str, scores: Mapping[str, float]
) -> Registered:
    """Logs the model in `folder` (as left by the trainer) to a run, registers it, and points the alias at it.

    What is logged is self-contained: the network's source file, its settings and its weights (safetensors), and a
    small wrapper; it loads on a machine that has only mlflow, numpy and torch. The alias is set last, so that a
    failure never leaves it on a half-registered model.

    Raises:
        UserError: the tracking server fails, or the folder holds no model.
    """
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.tracking import MlflowClient
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    local = storage.local_folder(folder)
    document = json.loads((local / "model.json").read_text())
    network = importlib.util.find_spec(f"trainer.models.{document['family']}")
    if network is None or network.origin is None:
        raise UserError(f"model {folder}: unknown family {document['family']!r}; use the version that trained it")
    n_features = math.prod(document["data"]["shape"])
    params = ParamSchema(
        [
            ParamSpec("task", DataType.string, "log_prob"),
            ParamSpec("n", DataType.long, 1),
            ParamSpec("seed", DataType.long, 0),
        ]
    )
    signature = ModelSignature(Schema([TensorSpec(np.dtype("float32"), (-1, n_features))]), None, params)
    with mlflow_errors(tracking_uri):
        mlflow.set_tracking_uri(tracking_uri)
        with mlflow.start_run(run_id=run_id):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).parent / "served_model.py"),
                artifacts={
                    "network": network.origin,
                    "model": str(local / "model.json"),
                    "weights": str(local / "weights.safetensors"),
                },
                signature=signature,
                pip_requirements=_requirements(),
                input_example=np.zeros((2, n_features), np.float32),
            )
        client = MlflowClient(tracking_uri)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        created = client.create_model_version(name, info.model_uri, run_id, model_id=info.model_id)
        version = str(created.version)
        for key, value in scores.items():
            client.set_model_version_tag(name, version, key, f"{value:.6g}")
        client.set_model_version_tag(name, version, "data.fingerprint", document["data"]["fingerprint"])
        client.set_registered_model_alias(name, alias, version)
    return Registered(int(version), f"models:/{name}@{alias}")


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [f"{package}=={version(package).split('+')[0]}" for package in ("torch", "numpy")]


class RegisteredModel:
    """A model of the registry, asked through MLflow's `predict` only, as any consumer would.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, or a logged model's path.
        tracking_uri: where the registry is.

    Raises:
        UserError: no such model, or one that is not of manymodes.
    """

    def __init__(self, uri: str, tracking_uri: str) -> None:
        import mlflow

        self.uri = uri
        with mlflow_errors(tracking_uri), _LOADING:
            mlflow.set_tracking_uri(tracking_uri)
            self._model = mlflow.pyfunc.load_model(uri)
        try:
            self.data: dict[str, Any] = self._model.unwrap_python_model().data
            self.shape: tuple[int, ...] = tuple(self.data["shape"])
        except (AttributeError, KeyError) as error:
            raise UserError(f"{uri} is not a model that manymodes registered: give the name of one") from error

    def _predict(self, x: np.ndarray, **params: Any) -> np.ndarray:
        try:
            return np.asarray(self._model.predict(x, params=params))
        except ValueError as error:
            raise UserError(f"{self.uri}: {one_line(error)}") from error

    def sample(self, n: int, seed: int) -> np.ndarray:
        """n samples [n, *shape], float32, the same for the same seed."""
        return self._predict(np.zeros((0, math.prod(self.shape)), np.float32), task="sample", n=n, seed=seed)

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """log p(x) in nats, [n] float64, for x [n, ...]."""
        return self._predict(np.asarray(x, np.float32).reshape(len(x), -1), task="log_prob")
