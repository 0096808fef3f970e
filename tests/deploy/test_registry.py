"""A registered model on a machine that knows nothing of manymodes."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from data.errors import UserError
from deploy.registry import fetch_model, register_model
from trainer.checkpoint import load_model
from trainer.tracking import mlflow_at

# What a consumer with mlflow, torch and numpy has; anything else of ours or of the training stack must not be needed.
CONSUMER = """
    import sys

    class Absent:
        names = {"cluster", "trainer", "data", "eval", "deploy", "ray", "deepspeed", "webdataset", "faiss",
                 "safetensors", "rich", "typer"}
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in self.names:
                raise ImportError(name + " is not on this machine")

    sys.meta_path.insert(0, Absent())
    before = list(sys.path)
    import json, mlflow, numpy as np
    mlflow.set_tracking_uri(sys.argv[1])
    model = mlflow.pyfunc.load_model(sys.argv[2])
    out = {}
    for n in (0, 1, 2, 1000):
        x = np.full((n, 64), 0.5, np.float32)
        out[f"log_prob {n}"] = list(model.predict(x).shape)
        out[f"responsibilities {n}"] = list(model.predict(x, params={"task": "responsibilities"}).shape)
    empty = np.zeros((0, 64), np.float32)
    draw = lambda seed: model.predict(empty, params={"task": "sample", "n": 5, "seed": seed})
    out["sample"] = list(draw(1).shape)
    out["same seed"] = bool((draw(1) == draw(1)).all())
    out["other seed"] = bool((draw(1) == draw(2)).all())
    out["value"] = float(model.predict(np.full((1, 64), 0.5, np.float32))[0])
    out["path"] = sys.path == before
    out["modules"] = sorted(Absent.names & set(sys.modules))
    print(json.dumps(out))
"""


def test_consumer_needs_only_mlflow_torch_and_numpy(finished_job, tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CONSUMER), finished_job.uri, finished_job.summary["model_uri"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    out = json.loads(found.stdout.strip().splitlines()[-1])
    model, _ = load_model(str(finished_job.folder / "model"))
    for n in (0, 1, 2, 1000):
        assert out[f"log_prob {n}"] == [n]
        assert out[f"responsibilities {n}"] == [n, model.n_components]
    assert out["sample"] == [5, 8, 8, 1]
    assert out["same seed"]
    assert not out["other seed"]
    import torch

    assert out["value"] == pytest.approx(model.log_prob(torch.full((1, 64), 0.5)).item(), rel=1e-6)
    assert out["path"]
    assert out["modules"] == []


def test_unknown_model_and_missing_database(finished_job, tmp_path):
    with pytest.raises(UserError, match="nobody") as caught:
        fetch_model("models:/nobody@candidate", finished_job.uri)
    assert "check the name" in str(caught.value)
    with pytest.raises(UserError, match="no MLflow database"):
        fetch_model("models:/nobody@candidate", f"sqlite:///{tmp_path}/nothing.db")
    assert not (tmp_path / "nothing.db").exists()


def test_a_foreign_model_is_refused_and_never_unpickled(tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"

    class Trap(mlflow.pyfunc.PythonModel):
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

        def predict(self, context, model_input, params=None):
            return model_input

    with mlflow_at(uri):
        experiment = mlflow.create_experiment("foreign", artifact_location=f"file://{tmp_path}/mlruns")
        with mlflow.start_run(experiment_id=experiment):
            mlflow.pyfunc.log_model(name="m", python_model=Trap(), pip_requirements=[], registered_model_name="foreign")
    (tmp_path / "sprung").unlink(missing_ok=True)
    with pytest.raises(UserError, match="not a model that manymodes registered"):
        fetch_model("models:/foreign/1", uri)
    assert not (tmp_path / "sprung").exists()


def test_registering_again_after_a_crash_gives_the_same_version(finished_job):
    again = register_model(
        str(finished_job.folder / "model"),
        name="digits-mfa",
        alias="candidate",
        tracking_uri=finished_job.uri,
        run_id=finished_job.summary["mlflow_run_id"],
        scores={},
    )
    assert again.version == finished_job.summary["model_version"]


def test_version_carries_scores_and_data(finished_job, tmp_path):
    from cluster.promotion import Protocol, promote
    from deploy.registry import fetch_artifacts
    from eval.reference import Reference
    from trainer.tracking import mlflow_client

    client = mlflow_client(finished_job.uri)
    version = client.get_model_version_by_alias("digits-mfa", "candidate")
    assert float(version.tags["ndb"]) == finished_job.summary["metrics"]["ndb"]
    assert len(version.tags["data.fingerprint"]) == 64
    assert version.run_id == version.tags["run"] == finished_job.summary["mlflow_run_id"]
    assert len(version.tags["recipe.fingerprint"]) == 64
    kept = fetch_artifacts(version.run_id, "reference", str(tmp_path), finished_job.uri)
    known = finished_job.summary["models"][-1]["protocol"]["bins_fingerprint"]
    assert Reference.load(kept).bins[0].fingerprint == known
    outcome = promote("digits-mfa", Protocol(), target="first", tracking_uri=finished_job.uri)
    assert outcome.promoted
    again = promote("digits-mfa", Protocol(n=500), source="first", target="candidate", tracking_uri=finished_job.uri)
    assert "already" in again.notes[0]


def test_mlflow_s_addresses_are_put_back(finished_job, tmp_path, monkeypatch):
    """Opening a model elsewhere does not decide where the next call looks."""
    import mlflow

    for tracking, registry in ((None, None), (f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db")):
        for name, value in (("MLFLOW_TRACKING_URI", tracking), ("MLFLOW_REGISTRY_URI", registry)):
            monkeypatch.delenv(name, raising=False)
            if value:
                monkeypatch.setenv(name, value)
        fetch_model(finished_job.summary["model_uri"], finished_job.uri)
        assert os.environ.get("MLFLOW_TRACKING_URI") == tracking
        assert os.environ.get("MLFLOW_REGISTRY_URI") == registry
        if registry:
            assert mlflow.get_registry_uri() == registry
