"""A classifier from recipe to registry, and what may be asked of it: one real job."""

import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.extractors import open_extractor
from cluster.models import LocalClassifier, open_classifier, open_mixture, open_model
from cluster.pipeline import run_job
from cluster.recipe import load_recipe
from data.errors import UserError
from data.manifest import load_manifest
from data.stream import read_blocks


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The digits classifier, trained for a few seconds."""
    folder = tmp_path_factory.mktemp("classifier")
    uri = f"sqlite:///{folder}/mlflow.db"
    recipe = load_recipe("digits-classifier", [f"tracking.uri={uri}"])
    table = run_job(recipe, str(folder / "out"), quiet=True)["table"]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return SimpleNamespace(folder=folder / "out", uri=uri, summary=summary, table=table)


def held_out(job):
    """The test split: samples [n, 8, 8, 1] in [0, 1] and labels [n]."""
    blocks = list(read_blocks(load_manifest(str(job.folder / "shards")), "test"))
    return tuple(np.concatenate([block[name] for block in blocks]) for name in ("x", "label"))


def test_scores_table_and_report(job):
    metrics = job.summary["metrics"]
    assert set(metrics) == {
        *("test_accuracy", "test_accuracy_se", "test_cross_entropy", "test_cross_entropy_se"),
    }
    assert metrics["test_accuracy"] > 0.94
    guess, own = job.summary["models"]
    assert guess["accuracy"] < 0.2 < own["accuracy"] == metrics["test_accuracy"]
    assert guess["cross_entropy"] == pytest.approx(np.log(10), abs=0.1)
    assert np.trace(own["confusion"]) / 359 == pytest.approx(own["accuracy"])
    assert job.table.columns[1] == "test accuracy"
    assert job.table.rows[1][0] == "classifier"
    html = (job.folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3
    assert "Confusion matrix" in html


def test_recorded_and_registered(job):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(job.uri)
    run = client.get_run(job.summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/test_accuracy"] == job.summary["metrics"]["test_accuracy"]
    assert len(client.get_metric_history(run.info.run_id, "train/accuracy")) == 15
    assert run.data.params["model.family"] == "classifier"
    version = client.get_model_version_by_alias("digits-classifier", "candidate")
    assert float(version.tags["test_accuracy"]) == pytest.approx(job.summary["metrics"]["test_accuracy"], abs=1e-5)


def test_opened_from_folder_and_registry(job):
    x, labels = held_out(job)
    for place in (str(job.folder), job.summary["model_uri"]):
        model = open_classifier(place, job.uri)
        assert model.test_accuracy == job.summary["metrics"]["test_accuracy"]
        probabilities = model.probabilities(x)
        assert probabilities.shape == (359, 10)
        assert np.mean(probabilities.argmax(1) == labels) == model.test_accuracy
        assert model.features(x).shape == (359, 128)
    assert isinstance(open_model(str(job.folder)), LocalClassifier)


def test_as_a_feature_extractor(job):
    x, _ = held_out(job)
    model = open_classifier(str(job.folder))
    digest = hashlib.sha256((job.folder / "model" / "weights.safetensors").read_bytes()).hexdigest()
    for place in (str(job.folder), job.summary["model_uri"]):
        extractor = open_extractor(f"classifier:{place}#sha256={digest[:16]}", job.uri)
        assert (extractor.n_features, extractor.fingerprint) == (128, digest)
        again = open_extractor(extractor.spec, job.uri)
        found = again(x)
        assert np.allclose(found.x, model.features(x), atol=1e-6)
        assert np.allclose(found.probabilities, model.probabilities(x), atol=1e-6)
    assert open_extractor(f"classifier:{job.folder}").name == "classifier:out"
    assert open_extractor("pixels")(x).x.shape == (359, 64)
    for spec, parts in {
        f"classifier:{job.folder}#sha256={'0' * 20}": [digest, "0" * 20],
        "classifier:": ["names no classifier"],
        "classifier:/nowhere": ["/nowhere", "no model there"],
        "clasifier:x": ["unknown feature extractor", "classifier:models:/NAME@ALIAS"],
    }.items():
        with pytest.raises(UserError) as caught:
            open_extractor(spec)
        assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(UserError, match=r"\[5, 5, 1\]"):
        extractor(np.zeros((3, 5, 5, 1), np.float32))


def test_what_needs_a_density_refuses_it(job, monkeypatch, capfd, tmp_path):
    from cluster import cli

    monkeypatch.chdir(tmp_path)
    for command in (
        *(["score", job.folder, "--data", "digits"], ["sample", job.folder, "--out", "a.png"]),
        *(["inpaint", job.folder, "--data", "digits", "--out", "a.png"], ["traverse", job.folder, "--out", "t"]),
        ["outliers", job.folder, "--data", "digits", "--out", "o"],
        ["evaluate", job.folder, "--reference", "digits", "--json"],
    ):
        monkeypatch.setattr(sys, "argv", ["manymodes", *map(str, command)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        message = capfd.readouterr().err.strip()
        assert left.value.code == 2
        assert "family classifier" in message
        assert "\n" not in message
        assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="give a density"):
        open_mixture(str(job.folder))


CONSUMER = """
import sys
class Absent:
    names = {"cluster", "trainer", "data", "eval", "deploy", "ray", "deepspeed", "webdataset", "faiss", "safetensors"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(name + " is not on this machine")
sys.meta_path.insert(0, Absent())
import json, mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/digits-classifier@candidate")
out = {}
for n in (0, 1, 2, 1000):
    x = np.linspace(0, 1, n * 64, dtype=np.float32).reshape(n, 64)
    out[n] = [list(model.predict(x, params={"task": task}).shape) for task in ("probabilities", "features")]
out["values"] = model.predict(x[:5]).tolist()
try:
    model.predict(x, params={"task": "log_prob"})
except Exception as error:
    out["refused"] = str(error)
print(json.dumps(out))
"""


def test_served_where_there_is_only_mlflow_torch_and_numpy(job, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
    found = subprocess.run(
        [sys.executable, "-c", CONSUMER, job.uri],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    out = json.loads(found.stdout.strip().splitlines()[-1])
    for n in (0, 1, 2, 1000):
        assert out[str(n)] == [[n, 10], [n, 128]]
    x = np.linspace(0, 1, 64_000, dtype=np.float32).reshape(1000, 64)[:5]
    assert np.allclose(out["values"], open_classifier(str(job.folder)).probabilities(x), atol=1e-6)
    assert "this model can do probabilities, features" in out["refused"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["training.method=em"], ["training.method=em", "classifier", "sgd"]),
        (["hierarchy={}"], ["hierarchy", "classifier"]),
        (["initialisation.n_init=5"], ["initialisation", "leave it out"]),
        (["evaluation.n_samples=5000"], ["evaluation", "leave it out"]),
        (["training.dequantise=true"], ["dequantise", "false"]),
        (["model.n_classes=1"], ["model.n_classes", "greater than or equal to 2"]),
        (["model.n_components=4"], ["unknown field 'model.n_components'", "width"]),
        (["model.family=clasifier"], ["choose one of mfa, classifier", "did you mean 'classifier'"]),
    ],
)
def test_recipes_that_do_not_fit_a_classifier(overrides, parts):
    with pytest.raises(UserError) as caught:
        load_recipe("digits-classifier", overrides)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_described_recipe_is_the_recipe(tmp_path):
    from cluster.recipe import described

    for name in ("digits-classifier", "digits"):
        (tmp_path / "r.yaml").write_text(described(load_recipe(name)))
        assert load_recipe(str(tmp_path / "r.yaml")).fingerprint() == load_recipe(name).fingerprint()


def test_data_that_cannot_be_learnt_is_refused_before_anything_starts(tmp_path, array_file):
    x = array_file(np.zeros((50, 4)))
    recipe = load_recipe("digits-classifier", [f"data.source=array:{x}", f"tracking.uri=sqlite:///{tmp_path}/m.db"])
    with pytest.raises(UserError, match="no labels"):
        run_job(recipe, str(tmp_path / "out"), quiet=True)
    assert not (tmp_path / "m.db").exists()
