"""The connection to Ray: an existing cluster by address, or one embedded in this process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

# Ray Train delivers one report per such interval (default 2 s); read by the driver before fit().
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from data.errors import UserError, one_line

CONNECT_SECONDS = 5.0


@contextmanager
def ray_session(address: str | None, cpus: float) -> Iterator[None]:
    """Connects to the cluster at `address` (HOST:PORT, ray://HOST:PORT or `auto`), or starts an embedded one.

    The embedded cluster has this machine's cores, and at least `cpus` of them, so that a recipe for two workers runs
    on one core as well (slower). It ends with the session; an existing cluster is left as it was.

    Raises:
        UserError: the address does not answer, or refuses the connection.
    """
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        _probe(address)
        try:
            ray.init(address=address, **options)
        except Exception as error:
            raise UserError(
                f"Ray at {address} cannot be used: {one_line(error)}; check the address and the token (RAY_AUTH_TOKEN)"
            ) from error
    else:
        ray.init(num_cpus=max(os.cpu_count() or 1, round(cpus + 0.5 - 1e-9)), include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Fails within seconds where Ray itself would wait for minutes."""
    if address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(f"Ray address {address!r} is not understood: give HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"Ray at {address} does not answer ({error.strerror or error}): check the address, or leave "
            "--ray-address out to start Ray here"
        ) from error


def require_resources(cpus: float, gpus: float) -> None:
    """Refuses a job that the cluster can never place; Ray itself would wait for ever.

    Raises:
        UserError: with what is asked for and what is there.
    """
    there = ray.cluster_resources()
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > there.get(name, 0):
            raise UserError(
                f"the job asks for {wanted:g} {name}s, the Ray cluster has {there.get(name, 0):g}: "
                f"lower scaling.workers or scaling.{name.lower()}s_per_worker, or add nodes"
            )
