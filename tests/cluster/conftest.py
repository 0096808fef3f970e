"""What the tests of the cluster share."""

import sys

import pytest

from cluster import cli


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Calls the command line in tmp_path; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["manymodes", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        out = capfd.readouterr()
        return code, out.out, out.err

    return run
