"""Shared fixtures. Every test writes below its own tmp_path."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# Before anything reads it: MLflow must not call home, and deepspeed must not look for a GPU on a CPU machine.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import numpy as np
import pytest

from data.manifest import Manifest, Origin
from data.shards import pack
from data.sources import SourceOptions, open_source

SHARED = Path(__file__).resolve().parents[2] / "shared"


class Called(NamedTuple):
    """What a command line ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Calls the command line in this process and in tmp_path, with an MLflow of its own there."""
    from cluster import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["manymodes", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        return Called(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def mnist_folder():
    """The folder of the four MNIST files; the test is skipped where there is none."""
    folder = Path(os.environ.get("MANYMODES_MNIST", SHARED / "data" / "mnist"))
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("no MNIST files: name their folder in MANYMODES_MNIST")
    return folder


@pytest.fixture(scope="session")
def digits_pack(tmp_path_factory):
    """The packed digits."""
    return pack(open_source("digits", SourceOptions()), str(tmp_path_factory.mktemp("digits")), rows_per_block=200)


@pytest.fixture
def manifest_for():
    """A manifest without samples, for models that only need to know a shape."""

    def make(shape, levels=None):
        dtype = "float32" if levels is None else "uint8"
        return Manifest(name="none", shape=shape, dtype=dtype, levels=levels, source=Origin(spec="none"), splits={})

    return make


@pytest.fixture
def array_file(tmp_path):
    """Writes an array as .npy and returns its path."""

    def make(x, name="x.npy"):
        path = tmp_path / name
        np.save(path, x)
        return str(path)

    return make


# Small enough for a test, long enough to be killed in the middle.
JOB_OVERRIDES = [
    "training.steps=400",
    "training.checkpoint_every=50",
    "hierarchy.steps=30",
    "evaluation.baselines=[gaussian]",
]


@pytest.fixture(scope="session")
def finished_job(tmp_path_factory):
    """Runs the digits recipe, embedded Ray, SQLite; returns its folder, tracking URI and summary."""
    from cluster.pipeline import run_job
    from cluster.recipe import load_recipe

    folder = tmp_path_factory.mktemp("job")
    uri = f"sqlite:///{folder}/mlflow.db"
    recipe = load_recipe("digits", [*JOB_OVERRIDES, f"tracking.uri={uri}"])
    run_job(recipe, str(folder / "out"), quiet=True)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return SimpleNamespace(folder=folder / "out", uri=uri, summary=summary, overrides=JOB_OVERRIDES)
