"""Models in and out of the MLflow registry."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import storage
from data.errors import UserError
from deploy.sources import write_sources
from trainer.checkpoint import model_class
from trainer.tracking import database_file, mlflow_at, mlflow_client, mlflow_errors

# Tag of a version that was registered to the end.
COMPLETE = "manymodes.complete"
# Where a run keeps the fitted reference that its model was judged by.
REFERENCE_ARTIFACT = "reference"


@dataclass(frozen=True)
class Registered:
    """A registered model version: its number and the URI under which its alias is loaded."""

    version: int
    uri: str


def register_model(
    folder: str,
    *,
    name: str,
    alias: str,
    tracking_uri: str,
    run_id: str,
    scores: Mapping[str, float],
    lineage: Mapping[str, str] | None = None,
) -> Registered:
    """Logs the model in `folder` (as left by the trainer) to a run, registers it, and points the alias at it.

    What is logged is self-contained: the network's source files, its settings and its weights (safetensors), and a
    small wrapper; it loads on a machine that has only mlflow, numpy and torch. Scores, `lineage`, the run and the
    data's fingerprint become tags. The alias moves last, so that a failure never leaves it on a half-registered model.

    Raises:
        UserError: the tracking server fails, or the folder holds no model.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    local = storage.local_folder(folder)
    document = json.loads((local / "model.json").read_text())
    n_features = math.prod(document["data"]["shape"])
    earlier = _version_of(name, tracking_uri, run_id)
    if earlier is not None:
        with mlflow_errors(tracking_uri):  # the job may have died before the alias
            mlflow_client(tracking_uri).set_registered_model_alias(name, alias, str(earlier))
        return Registered(earlier, f"models:/{name}@{alias}")
    with (
        tempfile.TemporaryDirectory() as temporary,
        mlflow_errors(tracking_uri),
        mlflow_at(tracking_uri),
    ):
        sources = Path(temporary) / "sources"
        write_sources(document["family"], sources)
        with mlflow.start_run(run_id=run_id):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).parent / "served_model.py"),
                artifacts={
                    "sources": str(sources),
                    "model": str(local / "model.json"),
                    "weights": str(local / "weights.safetensors"),
                },
                signature=_signature(document["family"], n_features),
                pip_requirements=_requirements(),
                input_example=np.zeros((2, n_features), np.float32),
            )
        client = mlflow_client(tracking_uri)
        if not client.search_registered_models(f"name = '{name}'"):
            with contextlib.suppress(MlflowException):  # another job may create it; if none does, the next call fails
                client.create_registered_model(name)
        created = client.create_model_version(name, info.model_uri, run_id, model_id=info.model_id)
        version = str(created.version)
        tags = {
            **{key: f"{value:.6g}" for key, value in scores.items()},
            **(lineage or {}),
            "run": run_id,
            "data.fingerprint": document["data"]["fingerprint"],
            COMPLETE: "true",
        }
        for key, tag in tags.items():
            client.set_model_version_tag(name, version, key, tag)
        client.set_registered_model_alias(name, alias, version)
    return Registered(int(version), f"models:/{name}@{alias}")


def _signature(family: str, n_features: int) -> Any:
    """What the model takes: samples [n, n_features] float32 (whatever can be made of them), and the parameters."""
    from mlflow.models.signature import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    from deploy.served_model import DEFAULTS, tasks_of

    types = {bool: DataType.boolean, int: DataType.long, str: DataType.string}
    params = [ParamSpec("task", DataType.string, tasks_of(model_class(family))[0])]
    for name, default in DEFAULTS.items():
        if isinstance(default, list):
            params.append(ParamSpec(name, DataType.boolean, default, shape=(-1,)))
        else:
            params.append(ParamSpec(name, types[type(default)], default))
    inputs = Schema([TensorSpec(np.dtype("float32"), (-1, n_features))])
    signature = ModelSignature(inputs, None, ParamSchema(params))
    # MLflow would refuse float64, data frames of it, empty frames, and codes to decode: the model checks its input
    # itself, as models do whose signature was inferred from type hints.
    signature._is_signature_from_type_hint = True
    return signature


def _version_of(name: str, tracking_uri: str, run_id: str) -> int | None:
    """The version that this run registered already: a job may die right after."""
    with mlflow_errors(tracking_uri):
        found = mlflow_client(tracking_uri).search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        complete = [int(version.version) for version in found if version.tags.get(COMPLETE) == "true"]
    return max(complete, default=None)


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [f"{package}=={version(package).split('+')[0]}" for package in ("torch", "numpy")]


@dataclass(frozen=True)
class Entry:
    """A version of a registered model as the registry has it."""

    name: str
    version: int
    run_id: str
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def uri(self) -> str:
        """Of this version, wherever the aliases move."""
        return f"models:/{self.name}/{self.version}"


def find_entry(name: str, tracking_uri: str, alias: str) -> Entry | None:
    """The version of a registered model that an alias, or a number, points at; None where the alias is not set.

    Raises:
        UserError: no such model or version, or the server fails.
    """
    _require_database(tracking_uri)
    with mlflow_errors(tracking_uri):
        client = mlflow_client(tracking_uri)
        aliases = {key: int(value) for key, value in client.get_registered_model(name).aliases.items()}
        number = int(alias) if alias.isdecimal() else aliases.get(alias)
        if number is None:
            return None
        found = client.get_model_version(name, str(number))
    pointing = tuple(sorted(key for key, value in aliases.items() if value == number))
    return Entry(name, number, str(found.run_id or ""), dict(found.tags), pointing)


def point_alias(entry: Entry, alias: str, tracking_uri: str, *, tags: Mapping[str, str], over: int | None) -> None:
    """Writes tags to a version, then moves an alias to it.

    Raises:
        UserError: the alias no longer points at the version `over` (None: at none), as somebody moved it meanwhile.
    """
    with mlflow_errors(tracking_uri):
        client = mlflow_client(tracking_uri)
        now = find_entry(entry.name, tracking_uri, alias)
        if (None if now is None else now.version) != over:
            raise UserError(f"{entry.name}@{alias} has been moved in the meantime: call again, to compare with it")
        for key, value in tags.items():
            client.set_model_version_tag(entry.name, str(entry.version), key, value)
        client.set_registered_model_alias(entry.name, alias, str(entry.version))


def fetch_artifacts(run_id: str, path: str, folder: str, tracking_uri: str) -> str | None:
    """Copies what a run keeps at `path` into a local folder and returns its place there; None where it has nothing.

    Raises:
        UserError: no such run, or the server fails.
    """
    import mlflow

    with mlflow_errors(tracking_uri), mlflow_at(tracking_uri):
        above = path.rpartition("/")[0] or None
        if path not in [item.path for item in mlflow_client(tracking_uri).list_artifacts(run_id, above)]:
            return None
        return str(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path, dst_path=folder))


def _require_database(tracking_uri: str) -> None:
    database = database_file(tracking_uri)
    if database is not None and not database.exists():
        raise UserError(f"no MLflow database at {database}: run this in the folder of the job, or give --tracking-uri")


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

    _require_database(tracking_uri)
    with mlflow_errors(tracking_uri), mlflow_at(tracking_uri):
        folder = mlflow.artifacts.download_artifacts(artifact_uri=uri)
    artifacts = Path(folder) / "artifacts"
    if not (artifacts / "model.json").is_file():
        raise UserError(f"{uri} is not a model that manymodes registered: give the name of one")
    return str(artifacts)
