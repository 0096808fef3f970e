"""MLflow runs: where they are recorded, and logging that never stops a training run."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

# Read by MLflow at import: no telemetry, no chatter, and an unreachable server fails in seconds, not in minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # its errors are raised as well
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from data.errors import UserError, one_line

# MLflow is imported where it is used: it costs a second, and most worker processes record nothing.


_SQLITE = "sqlite:///"
# What another process may take to create a database.
_CREATION_SECONDS = 120.0


def mlflow_client(uri: str) -> Any:
    """A client of the runs and of the model registry at one address, whatever this process talked to before.

    Raises:
        UserError: a SQLite database that is not there yet cannot be created.
    """
    from mlflow.tracking import MlflowClient

    path = database_file(uri)
    if path is not None and not path.exists():
        with mlflow_errors(uri):
            _create_database(path)
    return MlflowClient(uri, registry_uri=uri)


@contextmanager
def mlflow_at(uri: str) -> Iterator[None]:
    """Points those calls of MLflow that take no address at this one, for runs and registry, and back afterwards.

    MLflow notes addresses in the environment: left there, they would decide what this process, and those that it
    starts, take for their default.
    """
    import mlflow

    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    before = {name: os.environ.get(name) for name in names}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(before["MLFLOW_REGISTRY_URI"] or "")
        for name, value in before.items():  # an address that was set by a call stands here, too
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _failures() -> tuple[type[Exception], ...]:
    """What MLflow lets through: its own exceptions, the database's, missing drivers, unusable addresses and files."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, ImportError, ValueError, OSError


def _mlflow_exception() -> type[Exception]:
    from mlflow.exceptions import MlflowException

    return MlflowException


def database_file(uri: str) -> Path | None:
    """The file of a SQLite tracking URI as `resolve_uri` gives it; None for a server."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE).partition("?")[0])


def _create_database(path: Path) -> None:
    """Creates MLflow's database whole or not at all, by one process: MLflow cannot go on with a part of its tables."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"manymodes-{name}.lock")
    try:
        lock.acquire(timeout=_CREATION_SECONDS)
    except Timeout as error:
        raise UserError(f"another process has been creating {path} for minutes: end it, or try again") from error
    partial = path.with_name(path.name + ".partial")
    try:
        if path.exists():  # the other process has created it
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_database(partial)  # of a process that was killed
        store = SqlAlchemyStore(f"{_SQLITE}{partial}", (path.parent / "mlruns").as_uri())
        store.engine.dispose()
        os.replace(partial, path)
    finally:
        _remove_database(partial)
        lock.release()


def _remove_database(path: Path) -> None:
    for ending in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


def resolve_uri(uri: str | None) -> str:
    """The tracking URI to use: the given one, else MLFLOW_TRACKING_URI, else `mlflow.db` in this folder.

    The default is MLflow's own, so that `mlflow ui` started here finds the runs. SQLite paths are made absolute,
    because workers run elsewhere.

    Raises:
        UserError: a malformed address, a scheme that MLflow cannot track to, or a SQLite path that is no file.
    """
    text = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    try:
        scheme = urlsplit(text).scheme
    except ValueError as error:
        raise UserError(f"tracking URI {text!r} is malformed ({one_line(error)}): give http(s)://HOST:PORT") from error
    if scheme == "sqlite":
        return _resolve_sqlite(text)
    if scheme.partition("+")[0] not in ("http", "https", "postgresql", "mysql", "mssql"):
        raise UserError(f"tracking URI {text!r} is not usable: give sqlite:///FILE.db or http(s)://HOST:PORT")
    return text


def _resolve_sqlite(text: str) -> str:
    name, sign, options = text.removeprefix(_SQLITE).partition("?")
    path = Path(os.path.abspath(name))
    if not text.startswith(_SQLITE) or name in ("", ":memory:") or (path.exists() and not path.is_file()):
        raise UserError(f"tracking URI {text!r} does not name a database file: give sqlite:///FILE.db")
    if "?" in str(path) or unquote(str(path)) != str(path):
        # SQLAlchemy decodes the path of its URL, MLflow does not: one of them would end up in another folder.
        raise UserError(f"MLflow cannot keep a database at {path}, for the ? or % in it: use another folder")
    return f"{_SQLITE}{path}{sign}{options}"


def probe(uri: str) -> None:
    """Fails within seconds where nothing listens at a server's address.

    Raises:
        UserError: nothing does.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"MLflow at {without_password(uri)} does not answer ({one_line(error)}): check the address "
            "(MLFLOW_TRACKING_URI, or tracking.uri in the recipe) and that the server runs"
        ) from error


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turns MLflow's failures, its database's and its drivers' into one line that names the address."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, _failures()):
            raise
        place = without_password(uri)
        if isinstance(error, ImportError):
            raise UserError(f"MLflow at {place} needs a package ({one_line(error)}): install it") from error
        if getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(
                f"MLflow at {place}: {_reason(error)}; check the name, and that this is the right MLflow "
                "(MLFLOW_TRACKING_URI or --tracking-uri)"
            ) from error
        raise UserError(
            f"MLflow at {place} refused or did not answer: {_reason(error)}; check the address (MLFLOW_TRACKING_URI, "
            "or tracking.uri in the recipe) and that the server runs"
        ) from error


def _reason(error: Exception) -> str:
    text = one_line(error)
    if "Max retries exceeded" in text or "Connection refused" in text:
        return "no connection"
    return text if len(text) < 200 else text[:200] + "..."


def without_password(uri: str) -> str:
    """An address as it may be shown."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def start_run(uri: str, experiment: str, name: str, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """Creates a run (and the experiment, where it is new) and returns its id.

    Raises:
        UserError: the tracking server cannot be reached or refuses.
    """
    from mlflow.entities import Param

    with mlflow_errors(uri):
        client = mlflow_client(uri)
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else _create_experiment(client, uri, experiment)
        run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
        items = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for i in range(0, len(items), 100):
            client.log_batch(run.info.run_id, params=items[i : i + 100])
        return str(run.info.run_id)


def _create_experiment(client: Any, uri: str, name: str) -> str:
    location, database = None, database_file(uri)
    if database is not None:  # artifacts lie beside the database, wherever the process that writes them is
        folder = re.sub(r"[^\w -]", "_", name)[:100]
        location = (database.parent / "mlruns" / folder).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except _mlflow_exception():
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)  # another job has created it in the meantime


def resume_run(uri: str, run_id: str) -> bool:
    """Marks an earlier run as running again; False where the server does not have it."""
    with mlflow_errors(uri):
        client = mlflow_client(uri)
        try:
            client.update_run(run_id, status="RUNNING")
        except _mlflow_exception() as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True


def finish_run(uri: str, run_id: str, *, failed: bool = False) -> None:
    """Marks a run as finished or failed."""
    with mlflow_errors(uri):
        mlflow_client(uri).set_terminated(run_id, "FAILED" if failed else "FINISHED")


def log_artifact_text(uri: str, run_id: str, text: str, name: str) -> None:
    """Stores a text (a report, a JSON file) with the run."""
    with mlflow_errors(uri):
        mlflow_client(uri).log_text(run_id, text, name)


def log_folder(uri: str, run_id: str, folder: str, name: str) -> None:
    """Stores a local folder's files with the run, below `name`."""
    with mlflow_errors(uri):
        mlflow_client(uri).log_artifacts(run_id, folder, name)


def log_files(uri: str, run_id: str, files: Mapping[str, bytes], name: str) -> None:
    """Stores bytes with the run, below `name`, as files of these names."""
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        log_folder(uri, run_id, folder, name)


def log_dataset(uri: str, run_id: str, *, name: str, source: str, fingerprint: str) -> None:
    """Records which data the run used, by the first 36 characters of its fingerprint."""
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    with mlflow_errors(uri):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a local path can be read as several kinds of source, all alike
            dataset = MetaDataset(source=resolve_dataset_source(source), name=name, digest=fingerprint[:36])
        entry = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])
        mlflow_client(uri).log_inputs(run_id, [entry])


class RunLogger:
    """Metrics of a run, sent in batches. A server that fails costs the metrics, never the training.

    Used by rank 0 of a training job and by the driver; `uri=None` logs nothing.
    """

    def __init__(self, uri: str | None, run_id: str | None, *, every_seconds: float = 2.0) -> None:
        self.client = mlflow_client(uri) if uri and run_id else None
        self.run_id = run_id
        self.every_seconds, self.sent_at = every_seconds, time.monotonic()
        self.pending: list[Any] = []
        self.failures = 0

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Queues metrics of one step."""
        if self.client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.pending += [Metric(name, float(value), now, step) for name, value in values.items()]
        if time.monotonic() - self.sent_at > self.every_seconds:
            self.flush()

    def flush(self) -> None:
        """Sends what is queued."""
        if self.client is None:
            return
        self.sent_at = time.monotonic()
        batch, self.pending = self.pending, []
        try:
            for i in range(0, len(batch), 1000):
                self.client.log_batch(self.run_id, metrics=batch[i : i + 1000])
            self.failures = 0
        except Exception as error:
            if not isinstance(error, _failures()):
                raise
            print(f"manymodes: metrics were not recorded in MLflow: {_reason(error)}", file=sys.stderr)
            self.failures += 1
            if self.failures == 3:  # each try may wait for a silent server
                self.client = None


class ChildRuns:
    """A child run for each of a run's sub-tasks, with its numbers as metrics.

    MLflow's failures cost the record, never the work. Sub-tasks that an earlier call recorded are not again.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self.recorded: set[str] = set()
        self.usable = True
        with self._forgiven():
            client = mlflow_client(uri)
            self.experiment = client.get_run(run_id).info.experiment_id
            found = client.search_runs([self.experiment], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=5000)
            self.recorded = {run.data.tags["subtask"] for run in found if "subtask" in run.data.tags}

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """Records one sub-task."""
        if name in self.recorded or not self.usable:
            return
        from mlflow.entities import Metric

        with self._forgiven():
            client = mlflow_client(self.uri)
            tags = {"mlflow.parentRunId": self.run_id, "subtask": name}
            run = client.create_run(self.experiment, run_name=name, tags=tags)
            now = int(time.time() * 1000)
            numbers = {key: value for key, value in result.items() if value is not None}
            client.log_batch(run.info.run_id, [Metric(key, float(v), now, 0) for key, v in numbers.items()])
            client.set_terminated(run.info.run_id)
            self.recorded.add(name)

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not isinstance(error, _failures()):
                raise
            print(f"manymodes: sub-tasks are not recorded in MLflow: {_reason(error)}", file=sys.stderr)
            self.usable = False  # each try may wait for a silent server


class SubMixtureRuns(ChildRuns):
    """A child run for each sub-mixture of a job, and one table of all of them with the job."""

    def __init__(self, uri: str, run_id: str) -> None:
        super().__init__(uri, run_id)
        self.rows: dict[int, Mapping[str, Any]] = {}

    def add_component(self, component: int, result: Mapping[str, Any]) -> None:
        """Records one sub-mixture."""
        self.rows[component] = result
        self.add(f"component {component}", result)

    def close(self) -> None:
        """Stores the table `sub-mixtures.csv` with the job's run."""
        if not self.rows or not self.usable:
            return
        columns = list(next(iter(self.rows.values())))
        lines = [",".join(["component", *columns])]
        for k in sorted(self.rows):
            values = (self.rows[k].get(name) for name in columns)
            lines.append(",".join([str(k), *("" if value is None else str(value) for value in values)]))
        with self._forgiven():
            mlflow_client(self.uri).log_text(self.run_id, "\n".join(lines) + "\n", "sub-mixtures.csv")


_PACKAGES = ("manymodes", "torch", "numpy", "ray", "deepspeed", "faiss-cpu", "faiss-gpu", "webdataset", "mlflow")


def versions() -> dict[str, str]:
    """The versions of what a run's numbers depend on, for its tags."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in _PACKAGES:
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    return found
