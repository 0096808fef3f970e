"""The entry point: streams and signals are made ready before anything heavy is imported, then come the commands."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn

_RESUMED = "the same command goes on where it stopped"
_AFTERWARDS = {
    **dict.fromkeys(("run", "train", "reproduce"), _RESUMED),
    "submit": "a job that was submitted goes on: `manymodes jobs list` names it",
}


def main() -> None:
    """Runs the command line; an interruption, however early, is one line and exit code 130."""
    try:
        prepare()
        from cluster import cli

        cli.main()
    except KeyboardInterrupt:
        leave_interrupted()


def prepare() -> None:
    """Makes SIGTERM end a command as Ctrl-C does, and the standard streams such that messages cannot fail on them."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the caller (`>&-`): a file opened later would get its number, and our messages
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
        elif hasattr(stream, "reconfigure"):  # an ASCII terminal must not end a job at its last line
            stream.reconfigure(errors="replace")


def leave_interrupted() -> NoReturn:
    """Says so in one line and ends with the shell's code for it."""
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    print("; ".join(filter(None, ("manymodes: interrupted", _AFTERWARDS.get(command)))), file=sys.stderr)
    sys.exit(130)


def _terminated(signum: int, frame: Any) -> None:
    """SIGTERM ends a job as Ctrl-C does: Ray and the MLflow run are closed."""
    raise KeyboardInterrupt


if __name__ == "__main__":  # as a submitted job calls it
    main()
