"""Models in and out of the MLflow registry."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import storage
from data.errors import UserError
from trainer.checkpoint import model_class
from trainer.tracking import database_file, mlflow_at, mlflow_client, mlflow_errors

# Tag of a version that was registered to the end.
COMPLETE = "manymodes.complete"


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
    from mlflow.exceptions import MlflowException
    from mlflow.models.signature import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    local = storage.local_folder(folder)
    document = json.loads((local / "model.json").read_text())
    network = importlib.util.find_spec(f"trainer.models.{document['family']}")
    if network is None or network.origin is None:
        raise UserError(f"model {folder}: unknown family {document['family']!r}; use the version that trained it")
    n_features = math.prod(document["data"]["shape"])
    task = "log_prob" if hasattr(model_class(document["family"]), "log_prob") else "probabilities"
    earlier = _version_of(name, tracking_uri, run_id)
    if earlier is not None:
        return Registered(earlier, f"models:/{name}@{alias}")
    params = ParamSchema(
        [
            ParamSpec("task", DataType.string, task),
            ParamSpec("n", DataType.long, 1),
            ParamSpec("seed", DataType.long, 0),
        ]
    )
    signature = ModelSignature(Schema([TensorSpec(np.dtype("float32"), (-1, n_features))]), None, params)
    with mlflow_errors(tracking_uri), mlflow_at(tracking_uri):
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
        client = mlflow_client(tracking_uri)
        if not client.search_registered_models(f"name = '{name}'"):
            with contextlib.suppress(MlflowException):  # another job may create it; if none does, the next call fails
                client.create_registered_model(name)
        created = client.create_model_version(name, info.model_uri, run_id, model_id=info.model_id)
        version = str(created.version)
        for key, value in scores.items():
            client.set_model_version_tag(name, version, key, f"{value:.6g}")
        client.set_model_version_tag(name, version, "data.fingerprint", document["data"]["fingerprint"])
        client.set_registered_model_alias(name, alias, version)
        client.set_model_version_tag(name, version, COMPLETE, "true")
    return Registered(int(version), f"models:/{name}@{alias}")


def _version_of(name: str, tracking_uri: str, run_id: str) -> int | None:
    """The version that this run registered already, alias and all: a job may die right after."""
    with mlflow_errors(tracking_uri):
        found = mlflow_client(tracking_uri).search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        complete = [int(version.version) for version in found if version.tags.get(COMPLETE) == "true"]
    return max(complete, default=None)


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [f"{package}=={version(package).split('+')[0]}" for package in ("torch", "numpy")]


def fetch_model(uri: str, tracking_uri: str) -> str:
    """The local folder of a registered model's weights and settings, ready for `trainer.checkpoint.load_model`.

    Nothing that lies in the registry is executed or unpickled: the weights go into this installation's own network.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION or models:/MODEL_ID.
        tracking_uri: where the registry is.

    Raises:
        UserError: no such model, or one that manymodes did not register.
    """
    import mlflow

    database = database_file(tracking_uri)
    if database is not None and not database.exists():
        raise UserError(
            f"no MLflow database at {database}: run this in the folder of the job, or give --tracking-uri"
        )
    with mlflow_errors(tracking_uri), mlflow_at(tracking_uri):
        folder = mlflow.artifacts.download_artifacts(artifact_uri=uri)
    artifacts = Path(folder) / "artifacts"
    if not (artifacts / "model.json").is_file():
        raise UserError(f"{uri} is not a model that manymodes registered: give the name of one")
    return str(artifacts)
