"""A whole deployment on loopback, from nothing: two Ray nodes with tokens, S3 storage, MLflow on PostgreSQL with users.

A job is submitted to the head over HTTP; its shards and results go to the S3 stand-in, its metrics and model to MLflow;
a virtual environment that has only mlflow, torch and numpy then loads the model by its alias and samples from it.
The same job is then submitted with what can be wrong. Every process that is started is ended by its own id.

Needs root (the second node gets a disk of its own), PostgreSQL's server (Debian: postgresql) and the extra `services`:
`python tests/cluster/two_nodes.py [FOLDER]`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
BUCKET, USER, PASSWORD, TOKEN = "manymodes", "admin", "a-password-for-tests", "0123456789abcdef0123456789abcdef"
CONSUMER = """
import sys, mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
drawn = model.predict(np.zeros((0, 64), np.float32), params={"task": "sample", "n": 7, "seed": 1})
values = model.predict(np.full((3, 64), 0.5, np.float32))
assert drawn.shape == (7, 8, 8, 1) and np.isfinite(values).all(), (drawn.shape, values)
foreign = {"data", "eval", "trainer", "cluster", "deploy", "ray", "deepspeed"} & set(sys.modules)
assert not foreign, foreign
print("sampled", drawn.shape, "log p", values.round(2).tolist())
"""
OVERRIDES = ["training.steps=60", "hierarchy.steps=20", "evaluation.baselines=[]", "registry.name=two-nodes"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployment:
    """The services, in one folder; each is ended by its own id."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, time.perf_counter()
        self.s3, self.sql, self.mlflow, self.gcs, self.http = (free_port() for _ in range(5))
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        self.store = {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3}"}
        self.client = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.mlflow}",
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }
        self.ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
        path = f"{BIN}:{os.environ['PATH']}"  # as in an image, where python is the one that has everything
        self.env = {**os.environ, **self.store, **self.client, **self.ray, "PATH": path}

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.began:6.1f} s  {text}", flush=True)

    @contextlib.contextmanager
    def process(self, name: str, command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        with open(self.folder / f"{name}.log", "wb") as log:
            options = {"env": self.env, "cwd": self.folder, **options}
            running = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options)
        try:
            yield running
        finally:
            end(running)

    def until(self, what: str, ready: Callable[[], object], seconds: float = 90) -> None:
        """Waits for a service, and shows its log where it does not come."""
        limit = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Exception):
                if ready():
                    return
            if time.monotonic() > limit:
                logs = {log.name: log.read_text(errors="replace")[-1500:] for log in self.folder.glob("*.log")}
                told = [f"{what} did not come up within {seconds:.0f} s", *(f"== {k}\n{v}" for k, v in logs.items())]
                raise SystemExit("\n".join(told))
            time.sleep(0.3)

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`manymodes ...` as a user of this machine calls it."""
        command = [str(BIN / "manymodes"), *arguments]
        same = {"cwd": self.folder, "capture_output": True, "text": True, "timeout": 400}
        return subprocess.run(command, env={**self.env, **(env or {})}, **same)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and the group that it leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
            return


@contextlib.contextmanager
def postgresql(at: Deployment) -> Iterator[str]:
    """A PostgreSQL server of our own; yields its SQLAlchemy URI."""
    tools = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
    if tools is None:
        raise SystemExit("no PostgreSQL server on this machine: install postgresql")
    place, options = at.folder / "postgresql", {}
    place.mkdir()
    if os.geteuid() == 0:  # it refuses to run as root
        os.chmod(at.folder, 0o755)
        shutil.chown(place, "postgres")
        options = {"user": "postgres", "group": "postgres", "extra_groups": []}
    same = {"check": True, "capture_output": True, "cwd": place, **options}
    subprocess.run([str(tools / "initdb"), "-D", str(place / "data"), "-A", "trust", "-U", "mlflow"], **same)
    command = [str(tools / "postgres"), "-D", str(place / "data"), "-p", str(at.sql), "-h", "127.0.0.1"]
    command += ["-k", str(place)]
    with at.process("postgresql", command, **{**options, "cwd": place}):
        at.until("PostgreSQL", lambda: socket.create_connection(("127.0.0.1", at.sql), 1))
        ready = [str(tools / "createdb"), "-h", "127.0.0.1", "-p", str(at.sql), "-U", "mlflow"]
        at.until("a database", lambda: subprocess.run([*ready, "mlflow"], check=True, capture_output=True) or True)
        subprocess.run([*ready, "auth"], check=True, capture_output=True)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{at.sql}"


@contextlib.contextmanager
def mlflow_server(at: Deployment, sql: str) -> Iterator[None]:
    """MLflow with users, its metadata in PostgreSQL and its artifacts in the bucket."""
    settings = at.folder / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {sql}/auth\nadmin_username = {USER}\n"
        f"admin_password = {PASSWORD}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = [
        *(str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(at.mlflow), "--workers", "1"),
        *("--backend-store-uri", f"{sql}/mlflow", "--artifacts-destination", f"s3://{BUCKET}/mlflow"),
        *("--serve-artifacts", "--app-name", "basic-auth"),
    ]
    env = {
        **at.env, "MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_S3_ENDPOINT_URL": at.store["AWS_ENDPOINT_URL"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-tests",
    }  # fmt: skip
    for name in at.client:
        env.pop(name)
    with at.process("mlflow", command, env=env):
        health = f"http://127.0.0.1:{at.mlflow}/health"
        at.until("MLflow", lambda: urllib.request.urlopen(health, timeout=2).status == 200)
        yield


@contextlib.contextmanager
def ray_nodes(at: Deployment) -> Iterator[None]:
    """A head with one core and a worker node with two; both want the token."""
    ray = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats"]
    # Short: a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as place:
        head = [
            *("--head", "--num-cpus", "1", "--port", str(at.gcs), "--node-ip-address", "127.0.0.1"),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(at.http), "--temp-dir", place),
        ]
        with at.process("head", [*ray, *head]):
            ready = urllib.request.Request(
                f"http://127.0.0.1:{at.http}/api/version", headers={"Authorization": f"Bearer {TOKEN}"}
            )
            at.until("Ray's head", lambda: urllib.request.urlopen(ready, timeout=2).status == 200)
            worker = [*ray, "--address", f"127.0.0.1:{at.gcs}", "--num-cpus", "2", "--node-ip-address", "127.0.0.1"]
            # A disk of its own, as on another machine: on one they share, each would clear up the other's files.
            apart = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
            with at.process("worker", [*apart, 'mount -t tmpfs tmpfs "$0" && exec "$@"', place, *worker]):
                status = [str(BIN / "ray"), "status", "--address", f"127.0.0.1:{at.gcs}"]
                same = {"env": at.env, "capture_output": True}
                at.until("two nodes", lambda: b"/3.0 CPU" in subprocess.run(status, **same).stdout)
                yield


def consume(at: Deployment) -> None:
    """A virtual environment of its own samples from the registered model."""
    place = at.folder / "consumer"
    venv.create(place, with_pip=True)
    pip = [str(place / "bin" / "pip"), "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*pip, "mlflow", "torch", "numpy"], check=True, env=quiet)
    at.say("consumer: mlflow, torch and numpy installed")
    command = [str(place / "bin" / "python"), "-c", CONSUMER, at.client["MLFLOW_TRACKING_URI"]]
    command.append("models:/two-nodes@candidate")
    # It knows the tracking server and nothing of the store.
    keep = {name: value for name, value in at.env.items() if not name.startswith(("AWS_", "RAY_"))}
    found = subprocess.run(command, env=keep, cwd=place, capture_output=True, text=True, timeout=300)
    if found.returncode:
        raise SystemExit(found.stderr[-3000:])
    at.say(f"consumer: {found.stdout.strip().splitlines()[-1]}")


def refusals(at: Deployment) -> None:
    """What can be wrong ends in one line and exit code 2, and registers nothing."""
    address = f"http://127.0.0.1:{at.http}"
    cases: dict[str, tuple[list[str], dict[str, str]]] = {
        "wrong token": (["--address", address], {"RAY_AUTH_TOKEN": "f" * 32}),
        "unreachable head": (["--address", f"http://127.0.0.1:{free_port()}"], {}),
        "missing bucket": (["--address", address, "--wait", "--out", "s3://no-such-bucket/x"], {}),
        "wrong MLflow password": (["--address", address, "--wait", "--env", "MLFLOW_TRACKING_PASSWORD=wrong"], {}),
    }
    for name, (options, env) in cases.items():
        out = [] if "--out" in options else ["--out", f"s3://{BUCKET}/refused"]
        overrides = [part for text in (*OVERRIDES, "registry.name=never") for part in ("--set", text)]
        found = at.run("submit", "digits", *out, *options, *overrides, env=env)
        text = [line for line in (found.stdout + found.stderr).splitlines() if line.startswith("manymodes: ")]
        if found.returncode != 2 or not text or "Traceback" in found.stdout + found.stderr:
            raise SystemExit(f"{name}: exit code {found.returncode}\n{found.stdout[-2000:]}\n{found.stderr[-2000:]}")
        at.say(f"refused, {name}: {text[0]}")


def main(folder: Path) -> None:
    at = Deployment(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(at.process("s3", [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(at.s3)]))
        at.until("the store", lambda: urllib.request.urlopen(at.store["AWS_ENDPOINT_URL"], timeout=2).status == 200)
        put = urllib.request.Request(f"{at.store['AWS_ENDPOINT_URL']}/{BUCKET}", method="PUT")
        urllib.request.urlopen(put, timeout=10)
        sql = stack.enter_context(postgresql(at))
        stack.enter_context(mlflow_server(at, sql))
        stack.enter_context(ray_nodes(at))
        at.say("two Ray nodes, a store, PostgreSQL and MLflow are up")
        overrides = [part for text in OVERRIDES for part in ("--set", text)]
        out = ["--out", f"s3://{BUCKET}/digits", "--address", f"http://127.0.0.1:{at.http}", "--wait"]
        found = at.run("submit", "digits", *out, *overrides)
        (folder / "job.log").write_text(found.stdout + found.stderr)
        if found.returncode:
            raise SystemExit(f"the job ended with {found.returncode}\n{found.stdout[-4000:]}\n{found.stderr[-2000:]}")
        (model,) = (line for line in found.stdout.splitlines() if "models:/two-nodes@" in line)
        at.say(f"the job has ended: {model}")
        refusals(at)
        consume(at)
    at.say("done; every process has ended")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True)  # a new one: what an earlier trial left would be in the way
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
