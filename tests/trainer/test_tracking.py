"""Where runs are recorded: addresses, a database that is created once and whole, and failures in one line."""

import sqlite3
import subprocess
import sys

import pytest
from sqlalchemy.exc import OperationalError

from data.errors import UserError
from trainer import tracking

RUN = """
import sys
from trainer import tracking
uri = tracking.resolve_uri(None)
run = tracking.start_run(uri, "tests", "r", params={"a": 1}, tags={})
tracking.log_artifact_text(uri, run, "text", "a.txt")
tracking.finish_run(uri, run)
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", RUN], cwd=folder, stderr=subprocess.PIPE, text=True)


def test_two_processes_create_one_database_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "a b#c [x]"
    folder.mkdir()
    (folder / "mlflow.db.partial").write_text("left by a process that was killed")
    jobs = [start(folder) for _ in range(2)]
    for job in jobs:
        _, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.db", "mlruns"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert len(list(folder.glob("mlruns/tests/*/artifacts/a.txt"))) == 2
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("select count(*) from runs where status = 'FINISHED'").fetchone() == (2,)


def test_a_database_that_cannot_be_created_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OperationalError("CREATE TABLE", {}, Exception("database or disk is full"))

    monkeypatch.setattr("mlflow.store.db.utils._upgrade_db", full)
    with pytest.raises(UserError, match="disk is full"):
        tracking.mlflow_client(f"sqlite:///{tmp_path}/m.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a?b", "p%41"])
def test_folders_that_mlflow_cannot_name_are_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match="use another folder"):
        tracking.resolve_uri("sqlite:///mlflow.db")


@pytest.mark.parametrize("uri", ["sqlite:///", "sqlite://", "sqlite:///:memory:", "sqlite:////dev/null", "http://[::1"])
def test_addresses_that_are_none(uri, tmp_path):
    with pytest.raises(UserError, match="tracking URI"):
        tracking.resolve_uri(uri)
    with pytest.raises(UserError, match="does not name a database file"):
        tracking.resolve_uri(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("uri", ["postgresql+foo://127.0.0.1:9/x", "mssql://127.0.0.1:9/x", "http://127.0.0.1:99999"])
def test_what_mlflow_cannot_use_is_one_line(uri, monkeypatch):
    with pytest.raises(UserError, match="MLflow at") as caught:
        tracking.start_run(tracking.resolve_uri(uri), "tests", "r", params={}, tags={})
    assert "\n" not in str(caught.value)


def test_a_text_file_is_no_database(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database at all, and long enough to have a header\n" * 50)
    with pytest.raises(UserError, match="not a database"):
        tracking.start_run(tracking.resolve_uri(f"sqlite:///{tmp_path}/notes.txt"), "tests", "r", params={}, tags={})
