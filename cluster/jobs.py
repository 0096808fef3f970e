"""Jobs on a Ray cluster, over its HTTP address: what is sent there, what comes back."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.recipe import shipped_recipes
from data.errors import UserError, one_line

# Left out of what is sent: environments, caches, results, data.
_EXCLUDED = {"venv", "runs", "mlruns", "mlartifacts", "build", "dist", "node_modules", "__pycache__"}
_EXCLUDED_SUFFIXES = (".npy", ".npz", ".tar", ".gz", ".zip", ".db", ".parquet", ".safetensors", ".pt", ".pth", ".onnx")
_LARGEST_PACKAGE = 100 << 20
_RECIPE = "submitted-recipe.yaml"
_ATTEMPTS_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended: Ray's status, its message, and the exit code of its command (None where it had none)."""

    status: str
    message: str
    exit_code: int | None

    @property
    def code(self) -> int:
        """What `submit --wait` exits with."""
        if self.status == "SUCCEEDED":
            return 0
        return self.exit_code or 1


def entrypoint(recipe: str, out: str, overrides: Sequence[str], command: str = "run") -> str:
    """The shell text that runs a recipe on the cluster; every part is quoted."""
    parts = ["python", "-m", "cluster.entry", command, recipe, "--out", out]
    return shlex.join([*parts, *(part for override in overrides for part in ("--set", override))])


@contextmanager
def package(folder: Path, recipe: str) -> Iterator[tuple[Path, str]]:
    """A copy of a working folder without data, results and environments; yields it and the recipe's name in it.

    A recipe given as a file travels along under a name of its own.

    Raises:
        UserError: more than 100 MB remain, or the folder cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="manymodes-submit-") as place:
        target = Path(place) / "package"
        try:
            shutil.copytree(folder, target, ignore=_ignored, symlinks=False, ignore_dangling_symlinks=True)
        except (OSError, shutil.Error) as error:
            raise UserError(f"cannot package {folder}: {one_line(error)}") from error
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        if size > _LARGEST_PACKAGE:
            raise UserError(
                f"{folder}: {size >> 20} MB remain without data and results, at most {_LARGEST_PACKAGE >> 20} MB are "
                "sent: give the project's own folder by --working-dir"
            )
        name = recipe
        if recipe not in shipped_recipes() and Path(recipe).is_file():
            shutil.copyfile(recipe, target / _RECIPE)
            name = _RECIPE
        yield target, name


def _ignored(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name in _EXCLUDED
        or name.endswith((*_EXCLUDED_SUFFIXES, ".egg-info", "_cache"))
        or name.startswith(".")
        or os.path.islink(os.path.join(folder, name))
    ]


class Jobs:
    """The jobs of one cluster, by its dashboard's address (http://HEAD:8265).

    Where the cluster asks for a token, it is taken from where Ray itself looks for it (RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token).

    Raises:
        UserError: the address is none, nobody answers there, or the token is refused.
    """

    def __init__(self, address: str) -> None:
        try:
            parts = urlsplit(address)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"address {address!r} is not understood: give http://HEAD:8265")
        if parts.username is not None:  # it would stand in messages and in the shell's history
            raise UserError(
                "the address holds a name or password: give http://HEAD:8265, and a token by RAY_AUTH_TOKEN"
            )
        self.address = address
        # Read by Ray when it is imported: a token is sent only in this mode.
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard_sdk", "job.sdk"):  # they say every upload and every closed connection
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
        self.client = self._asked(lambda: JobSubmissionClient(address))

    def submit(self, folder: Path, command: str, *, name: str, env: Mapping[str, str]) -> str:
        """Sends the folder and starts the command in it; returns the job's id.

        Raises:
            UserError: the cluster refuses it.
        """
        runtime = {"working_dir": str(folder), "env_vars": {"PYTHONUNBUFFERED": "1", **env}}
        limit = time.monotonic() + _ATTEMPTS_SECONDS
        while True:
            try:
                return str(self.client.submit_job(entrypoint=command, runtime_env=runtime, metadata={"name": name}))
            except Exception as error:
                # A cluster that has just started takes no job for some seconds.
                if "No available agent" not in str(error) or time.monotonic() > limit:
                    raise self._fault(error) from error
                time.sleep(1)

    def follow(self, job: str, write: Callable[[str], Any]) -> Outcome:
        """Passes on the job's output as it comes, and returns how it ended. A lost connection is taken up again.

        Raises:
            UserError: no such job, or the cluster no longer answers.
        """
        seen = 0
        lost: float | None = None
        while True:
            try:
                seen = asyncio.run(self._tail(job, seen, write))
                lost = None
            except RuntimeError as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > _ATTEMPTS_SECONDS:
                    raise UserError(f"{self.address}: the log of {job} ended early ({one_line(error)})") from error
                time.sleep(1)
            status = self.status(job)
            if status.status in ("SUCCEEDED", "FAILED", "STOPPED"):
                return status
            time.sleep(0.5)

    async def _tail(self, job: str, seen: int, write: Callable[[str], Any]) -> int:
        """Every connection begins with the log so far: what was written is left out."""
        place = 0
        async for text in self.client.tail_job_logs(job):
            fresh = text[max(0, seen - place) :]
            place += len(text)
            if fresh:
                write(fresh)
                seen = place
        return seen

    def status(self, job: str) -> Outcome:
        """Where a job stands.

        Raises:
            UserError: no such job.
        """
        found = self._asked(lambda: self.client.get_job_info(job))
        return Outcome(str(found.status.value), " ".join((found.message or "").split()), found.driver_exit_code)

    def rows(self) -> list[list[str]]:
        """Id, name, status, start and seconds of every submitted job, latest first."""
        found = [job for job in self._asked(self.client.list_jobs) if job.submission_id]
        rows = []
        for job in sorted(found, key=lambda job: -(job.start_time or 0)):
            began = (job.start_time or 0) / 1000
            end = (job.end_time or time.time() * 1000) / 1000
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)) if began else "–"
            name = (job.metadata or {}).get("name", "–")
            rows.append([job.submission_id, name, str(job.status.value), when, f"{end - began:.0f}" if began else "–"])
        return rows

    def log(self, job: str) -> str:
        """What a job has written so far.

        Raises:
            UserError: no such job.
        """
        return str(self._asked(lambda: self.client.get_job_logs(job)))

    def stop(self, job: str) -> bool:
        """Asks a job to end; False where it had ended already.

        Raises:
            UserError: no such job.
        """
        return bool(self._asked(lambda: self.client.stop_job(job)))

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:  # Ray has RuntimeError, ConnectionError and requests' kinds for all of these
            raise self._fault(error) from error

    def _fault(self, error: Exception) -> UserError:
        text = one_line(error)
        found = re.search(r"status code (\d{3})\b", text)
        status = found[1] if found else ""  # a port may hold any digits
        if status in ("401", "403") or "uthenticat" in text or "nauthorized" in text:
            return UserError(
                f"{self.address} refuses the token: set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's"
            )
        if "does not exist" in text or status == "404":
            return UserError(f"{self.address}: no such job: `manymodes jobs list` names them")
        return UserError(f"{self.address}: {text.rstrip('.')}; check the address, and that the cluster runs")


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


def parse_env(values: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts; NAME alone passes on what it is here.

    Raises:
        UserError: not of that form, or a variable that is not set here.
    """
    found = {}
    for text in values:
        name, sign, value = text.partition("=")
        if not name.isidentifier():
            raise UserError(f"--env {text!r} is not understood: write NAME=VALUE, or NAME to pass on its value here")
        if not sign and name not in os.environ:
            raise UserError(f"--env {name}: it is not set here: write {name}=VALUE")
        found[name] = value if sign else os.environ[name]
    return found


def project_folder() -> Path:
    """The folder that holds this package, where it is a checkout; else the working folder."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
