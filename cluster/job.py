"""A job's identity: its memory in the output folder, its MLflow run, and its connection to Ray."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster.placement import require_resources, require_workers
from cluster.recipe import Recipe
from cluster.session import ray_session
from data import storage
from data.errors import UserError
from trainer import tracking


@dataclass
class Job:
    """A job's memory of itself, `job.json` in the output folder: what makes a second call go on or start anew."""

    id: str
    recipe: str  # fingerprint
    run_id: str | None = None
    registered: dict[str, Any] | None = None
    data: str | None = None  # fingerprint of the packed data
    finished: bool = False

    @classmethod
    def find(cls, out: str, recipe: Recipe) -> Job:
        """The unfinished job of this recipe in `out`, or a new one; writes nothing."""
        path = storage.join(out, "job.json")
        if storage.exists(path):
            with suppress(ValueError, TypeError):
                last = cls(**json.loads(storage.read_bytes(path)))
                if not last.finished and last.recipe == recipe.fingerprint():
                    return last
        return cls(time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6], recipe.fingerprint())

    def begin(self, out: str) -> None:
        """Writes `job.json`, and removes the working files of earlier jobs."""
        self.save(out)
        work = storage.join(out, "work")
        for old in storage.names(work):
            if old != self.id:
                storage.remove(storage.join(work, old))

    def use_data(self, out: str, fingerprint: str) -> None:
        """Notes the data that the job works on; what it did on other data is removed."""
        if self.data not in (None, fingerprint):
            storage.remove(self.work(out))
        self.data = fingerprint
        self.save(out)

    def work(self, out: str) -> str:
        """The folder of the job's working files."""
        return storage.join(out, "work", self.id)

    def save(self, out: str) -> None:
        """Writes `job.json`."""
        storage.write_text(storage.join(out, "job.json"), json.dumps(asdict(self), indent=1))


@contextmanager
def exclusive(out: str) -> Iterator[None]:
    """Keeps other processes of this machine from working in the same output folder.

    Raises:
        UserError: one does.
    """
    place = str(Path(out).resolve()) if storage.is_local(out) else out
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"manymodes-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another job is at work in {out}: wait for it, or give another --out") from error
    try:
        yield
    finally:
        lock.release()


def connect(recipe: Recipe, job: Job, out: str, uri: str, ray_address: str | None, stack: ExitStack) -> str:
    """Starts Ray and the MLflow run at once; returns the run's id. Both are closed with the stack."""
    scaling = recipe.scaling
    with ThreadPoolExecutor(1) as side:
        # MLflow first: a run that Ray then refuses is marked as failed, a Ray session that MLflow refuses just ends.
        starting = side.submit(_tracked_run, job, recipe, out, uri)
        session = ExitStack()
        try:
            session.enter_context(ray_session(ray_address, scaling.workers * scaling.cpus_per_worker))
        except BaseException:
            with suppress(UserError):
                tracking.finish_run(uri, starting.result(), failed=True)
            raise
        stack.push(session)
        job.run_id = starting.result()
    stack.enter_context(_closing_run(uri, job.run_id))
    require_workers(scaling)
    if recipe.hierarchy:
        split = recipe.hierarchy
        require_resources("the sub-mixtures", {"CPU": split.cpus_per_task, "GPU": split.gpus_per_task})
    return job.run_id


def _tracked_run(job: Job, recipe: Recipe, out: str, uri: str) -> str:
    """The MLflow run of this job: the one that it began, if the server still has it, else a new one."""
    if job.run_id and tracking.resume_run(uri, job.run_id):
        return job.run_id
    tags = {**tracking.versions(), "job": job.id, "recipe": recipe.name, "host.python": platform.python_version()}
    tags["checkpoints"] = storage.join(job.work(out), "root", "checkpoints")
    commit = _commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    params = _flat(recipe.model_dump(mode="json"))
    return tracking.start_run(uri, recipe.tracking.experiment, f"{recipe.name}-{job.id}", params=params, tags=tags)


def _commit() -> str | None:
    """The commit of the code, where it runs from a git checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in document.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


@contextmanager
def _closing_run(uri: str, run_id: str) -> Iterator[None]:
    """Marks the MLflow run as finished or failed, whatever happens."""
    try:
        yield
    except BaseException:
        with suppress(UserError):
            tracking.finish_run(uri, run_id, failed=True)
        raise
    tracking.finish_run(uri, run_id)
