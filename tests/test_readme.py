"""What the README says is run: its commands exist, its shell examples work, its links resolve."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_install_and_first_picture_are_near_the_top():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines) if "make demo" in line) < 20
    assert next(i for i, line in enumerate(lines) if line.startswith("![")) < 35


def test_links_and_folders_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^\| `(\w+)/`", README, re.M):
        assert (ROOT / folder).is_dir(), folder


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_commands_run(finished_job, tmp_path, monkeypatch):
    """Every `manymodes` line, in order, in a folder where the demo has run."""
    from cluster import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished_job.uri)
    commands = [shlex.split(command) for command in COMMANDS if command.startswith("manymodes ")]
    assert len(commands) >= 5
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not exit_.value.code, command
    assert (tmp_path / "runs" / "missing.html").exists()
    for name in ("samples.png", "outliers/outliers.csv", "completions.png", "traverse/interpolation.gif"):
        assert (tmp_path / "runs" / name).exists()


def test_python_example_runs(finished_job, tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert "sqlite:///mlflow.db" in code
    code = code.replace("sqlite:///mlflow.db", finished_job.uri)
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("manymodes ")])
def test_other_commands_are_known(command):
    assert command.split()[0] in ("make", "source")
