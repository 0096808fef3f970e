"""Starts the Ray Serve application on an address of this machine, inside of a Ray session."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from data.errors import UserError, one_line
from deploy.serving.jobs import Limits

_NAME = "manymodes"
_END_SECONDS = 30.0


def check_place(host: str, port: int, no_token: bool) -> str | None:
    """The token of the server, None where it goes without one; refuses what cannot or should not be listened to.

    Raises:
        UserError: no token in the environment, an open server beyond this machine, or an address that is taken.
    """
    from deploy.serving.application import required_token

    token = None if no_token else required_token()
    if no_token and not _is_loopback(host):
        raise UserError(f"--no-token with --host {host}: everybody who reaches it could use it; set a token")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot listen on {host}:{port} ({reason}): choose another --host or --port") from error
    return token


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextmanager
def serving(place: str, label: str, host: str, port: int, token: str | None, limits: Limits) -> Iterator[None]:
    """Serves a model's folder while inside.

    Needs a Ray session of this process's own, with which Serve ends. Requests that are being answered get their answer.

    Raises:
        UserError: the application does not come up.
    """
    from ray import serve

    from deploy.serving.application import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        bound = application(place, None, label=label, token=token, limits=limits)
        serve.run(bound, name=_NAME, route_prefix="/", logging_config=quiet)
    except Exception as error:
        raise UserError(f"the server did not start: {one_line(error)}") from error

    try:
        yield
    finally:
        # Waits for what is being answered; Ray ends with us, so that a wait without end gains nothing.
        deleting = threading.Thread(target=serve.delete, args=(_NAME,), daemon=True)
        deleting.start()
        deleting.join(_END_SECONDS)
