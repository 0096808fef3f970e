"""The connection to Ray: an existing cluster by address, or one embedded in this process."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

# Ray Train delivers one report per such interval (default 2 s); read by the driver before fit().
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from data.errors import UserError, one_line

CONNECT_SECONDS = 5.0
# A head node that has much to do may need a while.
ANSWER_SECONDS = 15.0
# HTTP/2's first frame, empty: three bytes of length, type 4, flags, stream.
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"


@contextmanager
def ray_session(address: str | None, cpus: float) -> Iterator[None]:
    """Connects to the cluster at `address` (HOST:PORT, ray://HOST:PORT or `auto`), or starts an embedded one.

    Without an address, RAY_ADDRESS counts, as it is set inside of a submitted job. An embedded cluster has the cores
    that Ray finds, and at least `cpus` of them, so that a recipe for two workers runs on one core as well (slower).
    It ends with the session; an existing cluster is left as it was.

    Raises:
        UserError: the address does not answer, or refuses the connection.
    """
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        probe(address)
        try:
            _init(address=address, **options)
        except Exception as error:
            raise UserError(
                f"Ray at {address} cannot be used: {one_line(error)}; check the address and the token (RAY_AUTH_TOKEN)"
            ) from error
    else:
        # "local": without an address Ray would join (or wait for) a cluster that somebody started on this machine.
        _init(address="local", include_dashboard=False, **options)
        if ray.cluster_resources().get("CPU", 0) < cpus:
            ray.shutdown()
            _init(address="local", num_cpus=math.ceil(cpus), include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _init(**options: Any) -> None:
    """ray.init, which takes SIGTERM for itself (and then dies of SIGABRT): our handlers are put back after it."""
    ours = {}
    if threading.current_thread() is threading.main_thread():
        ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except SystemExit as error:  # what Ray's handler makes of SIGTERM in the meantime
        raise KeyboardInterrupt from error
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type of its own for it
            raise
        raise UserError("Ray did not start in time on this machine, which may be busy: try again") from error
    finally:
        for number, handler in ours.items():
            if callable(handler):  # a program that has no handler of its own is better served by Ray's
                signal.signal(number, handler)


def probe(address: str) -> None:
    """Fails within seconds, with a UserError, where Ray itself would wait for minutes."""
    if address in ("auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(f"Ray address {address!r} is not understood: give HOST:PORT, ray://HOST:PORT or auto")
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
            plain = os.environ.get("RAY_USE_TLS", "0") != "1"  # a server with TLS would not answer
            if plain and not _speaks_grpc(connection):
                raise OSError("what listens there is not Ray")
    except (OSError, UnicodeError) as error:  # the latter from a host name that cannot be one
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"Ray at {address} does not answer ({reason}): check the address, or leave --ray-address out to start Ray "
            "here"
        ) from error


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether the other side begins HTTP/2, as every server of Ray's does; Ray would wait for others for minutes."""
    connection.settimeout(ANSWER_SECONDS)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
    answer = b""
    while len(answer) < len(_SETTINGS):
        part = connection.recv(64)
        if not part:
            break
        answer += part
    return answer[3:4] == _SETTINGS[3:4]
