"""What is sent to a cluster, how its command is quoted, and what is refused before anything is sent."""

import shlex
import socket

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.jobs import Jobs, Outcome, entrypoint, package, parse_env, project_folder
from data.errors import UserError


def test_the_command_is_one_shell_word_for_each_argument():
    hostile = ["a; rm -rf /", "$(id)", 'it\'s "x"', "registry.name=a b\nc"]
    text = entrypoint(hostile[0], "s3://b/x y", hostile)
    words = shlex.split(text)
    assert words[:5] == ["python", "-m", "cluster.entry", "run", hostile[0]]
    assert words[5:7] == ["--out", "s3://b/x y"]
    assert words[7:] == [part for text in hostile for part in ("--set", text)]


def test_data_results_and_environments_stay_at_home(tmp_path):
    left = ("runs/r.py", ".venv/v.py", "a/__pycache__/c.py", "big.npy", "mlflow.db", ".env")
    for name in ("data/x.py", "m/own.py", *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to("/etc")
    recipe = tmp_path / "elsewhere.yaml"
    recipe.write_text("name: x")
    with package(tmp_path, str(recipe)) as (folder, name):
        sent = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert (folder / name).read_text() == "name: x"
        place = folder
    assert sent == {"data/x.py", "m/own.py", "elsewhere.yaml", name}
    assert not place.exists()
    (tmp_path / "digits").write_text("name: mine")  # beside a shipped recipe of this name, which is meant
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        with package(tmp_path, "digits") as (_, name):
            assert name == "digits"


def test_the_project_itself_is_small_and_whole():
    with package(project_folder(), "digits") as (folder, _):
        for name in ("cluster/entry.py", "trainer/recipes/digits.yaml", "eval/report.html.j2", "data/stream.py"):
            assert (folder / name).is_file()
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 10 << 20


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.jobs._LARGEST_PACKAGE", 1000)
    (tmp_path / "x.txt").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="working-dir"), package(tmp_path, "digits"):
        pass


def test_variables(monkeypatch):
    monkeypatch.setenv("HERE", "a=b")
    assert parse_env(["X=1=2", "HERE"]) == {"X": "1=2", "HERE": "a=b"}
    for text in ("1X=2", "=x", "NOT_SET_ANYWHERE"):
        with pytest.raises(UserError, match="--env"):
            parse_env([text])


def test_exit_codes():
    assert Outcome("SUCCEEDED", "", 0).code == 0
    assert Outcome("FAILED", "", 2).code == 2
    assert Outcome("FAILED", "", None).code == 1
    assert Outcome("STOPPED", "", None).code == 1


def test_faults_are_one_line_before_anything_is_sent():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    for arguments, words in (
        (["submit", "digits", "--out", "s3://b/x"], "--address"),
        (["submit", "digitz", "--out", "s3://b/x", "--address", nobody], "unknown recipe"),
        (["submit", "digits", "--out", "pipe:x", "--address", nobody], "refused"),
        (["submit", "digits", "--out", "s3://b/x", "--address", "head:8265"], "http://HEAD:8265"),
        (["submit", "digits", "--out", "s3://b/x", "--address", nobody], "check the address"),
        (["jobs", "list", "--address", nobody], "check the address"),
    ):
        found = CliRunner().invoke(app, arguments)
        assert isinstance(found.exception, UserError), (arguments, found.exception)
        assert words in str(found.exception)
        assert "\n" not in str(found.exception)
    with pytest.raises(UserError, match="not understood"):
        Jobs("ftp://x")


def test_a_manifest_is_printed_for_kubernetes():
    arguments = ["submit", "digits", "--out", "s3://b/x", "--kubernetes", "--image", "example/manymodes:1"]
    found = CliRunner().invoke(app, [*arguments, "--name", "one"])
    assert found.exit_code == 0, found.exception
    manifest = yaml.safe_load(found.stdout)
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("RayJob", "one")
    assert "s3://b/x" in shlex.split(manifest["spec"]["entrypoint"])
    refused = CliRunner().invoke(app, ["submit", "digits", "--out", "s3://b/x", "--image", "x"])
    assert "--kubernetes" in str(refused.exception)


def test_a_port_is_no_status():
    client = Jobs.__new__(Jobs)
    client.address = "http://head:40114"
    for text, words in (
        ("Failed to connect to Ray at address: http://head:40114", "check the address"),
        ("Request failed with status code 401: no", "refuses the token"),
        ("Request failed with status code 404: none", "no such job"),
        ("Request failed with status code 500: 403 things", "check the address"),
    ):
        assert words in str(client._fault(RuntimeError(text)))
