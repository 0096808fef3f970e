"""An autoencoder from recipe to registry, what its codes are good for, and a mixture on them: one real job."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.models import open_autoencoder
from cluster.pipeline import run_job
from cluster.recipe import load_recipe
from data.manifest import load_manifest
from data.stream import read_blocks


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The digits autoencoder, trained for a few seconds."""
    folder = tmp_path_factory.mktemp("autoencoder")
    uri = f"sqlite:///{folder}/mlflow.db"
    recipe = load_recipe("digits-swae", [f"tracking.uri={uri}", "training.steps=150", "scaling.workers=1"])
    run_job(recipe, str(folder / "out"), quiet=True)
    return SimpleNamespace(
        folder=folder / "out",
        data=str(folder / "out" / "shards"),
        uri=uri,
        summary=json.loads((folder / "out" / "summary.json").read_text()),
    )


def held_out(place, split="test"):
    blocks = list(read_blocks(load_manifest(str(place)), split))
    return tuple(np.concatenate([block[name] for block in blocks]) for name in ("x", "label"))


def test_report_metrics_and_pictures(job):
    metrics = job.summary["metrics"]
    assert {"ndb", "prior_distance_ratio", "reconstruction_mse"} <= set(metrics)
    assert metrics["prior_distance"] == pytest.approx(
        metrics["prior_distance_ratio"] * metrics["prior_distance_floor"], rel=1e-6
    )
    html = (job.folder / "report.html").read_text()
    for title in ("Codes over the prior", "Reconstructions", "Interpolations", "Principal components", "Decoded grid"):
        assert title in html
    from mlflow.tracking import MlflowClient

    client = MlflowClient(job.uri)
    names = [entry.path for entry in client.list_artifacts(job.summary["mlflow_run_id"], "pictures")]
    assert any(name.endswith("decoded-grid.png") for name in names)
    opened, (x, _) = open_autoencoder(str(job.folder)), held_out(job.data)
    error = np.square(opened.decode(opened.encode(x)).astype(np.float64) - x).mean()
    assert metrics["reconstruction_mse"] == pytest.approx(error, rel=1e-6)


def test_registered_model_encodes_and_decodes(job):
    import mlflow

    from trainer.tracking import mlflow_at

    opened, (x, _) = open_autoencoder(str(job.folder)), held_out(job.data)
    with mlflow_at(job.uri):
        served = mlflow.pyfunc.load_model(job.summary["model_uri"])
    codes = served.predict(x)
    np.testing.assert_allclose(codes, opened.encode(x), atol=1e-6)
    rebuilt = served.predict(codes, params={"task": "decode"})
    np.testing.assert_allclose(rebuilt, opened.decode(codes), atol=1e-6)
    assert served.predict(x, params={"task": "sample", "n": 3}).shape == (3, 8, 8, 1)


def test_images_without_a_channel_axis_and_single_ones(job, call, tmp_path):
    x, _ = held_out(job.data)
    np.save(tmp_path / "flat.npy", x[:40, :, :, 0].astype(np.float32))
    np.save(tmp_path / "one.npy", x[:1].astype(np.float32))
    assert call("codes", job.folder, "--data", "flat.npy", "--out", "pictures").code == 0
    code, _, err = call("codes", job.folder, "--data", "one.npy", "--out", "none")
    assert code == 2
    assert "give two or more" in err


def test_codes_of_a_set_keep_their_order_and_labels(job, call, tmp_path):
    x, labels = held_out(job.data)
    expected = open_autoencoder(str(job.folder)).encode(x)
    assert call("encode", job.folder, "--data", job.data, "--split", "train,test", "--out", "codes").code == 0
    codes, kept = held_out(tmp_path / "codes")
    np.testing.assert_allclose(codes, expected, atol=1e-6)
    np.testing.assert_array_equal(kept, labels)
    assert held_out(tmp_path / "codes", "train")[0].shape == (1438, 2)
    assert call("encode", job.folder, "--data", job.data, "--out", "codes.npz").code == 0
    with np.load(tmp_path / "codes.npz") as found:
        np.testing.assert_allclose(found["x"], expected, atol=1e-6)
        np.testing.assert_array_equal(found["label"], labels)
    assert call("encode", job.folder, "--data", job.data, "--out", "codes.npy").code == 0
    np.testing.assert_allclose(np.load(tmp_path / "codes.npy"), expected, atol=1e-6)

    rebuilt = open_autoencoder(str(job.folder)).decode(expected)
    assert call("decode", job.folder, "codes", "--out", "back").code == 0
    again, kept = held_out(tmp_path / "back")
    np.testing.assert_allclose(again, rebuilt, atol=1e-6)
    np.testing.assert_array_equal(kept, labels)
    assert call("decode", job.folder, "codes.npz", "--out", "back.npz").code == 0
    with np.load(tmp_path / "back.npz") as found:
        np.testing.assert_allclose(found["x"], rebuilt, atol=1e-6)
    assert call("decode", job.folder, "codes.npy", "--out", "back.png").code == 0
    assert (tmp_path / "back.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_by_commands(job, call, tmp_path):
    assert call("interpolate", job.folder, "--data", job.data, "--out", "lines.png", "-n", "3").code == 0
    done = call("codes", job.folder, "--data", job.data, "--out", "pictures")
    assert done.code == 0
    assert "ratio" in done.out
    assert json.loads((tmp_path / "pictures" / "codes.json").read_text())["n"] == 359
    assert (tmp_path / "pictures" / "decoded-grid.png").exists()
    assert call("demonstrate", "--out", "w.png").code == 0
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_refused_in_one_line(job, call, array_file):
    wrong = array_file(np.zeros((4, 9, 9, 1), np.uint8), "wrong.npy")
    three = array_file(np.zeros((4, 3), np.float32), "three.npy")
    for arguments, part in [
        (["encode", job.folder, "--data", wrong, "--out", "c"], "knows [8, 8, 1]"),
        (["encode", job.folder, "--data", job.data, "--out", "c.txt"], "give a .npy or .npz"),
        (["encode", job.folder, "--data", job.data, "--split", "train,test", "--out", "c.npy"], "for one split"),
        (["decode", job.folder, three, "--out", "x.npy"], "give finite ones, [n, 2]"),
        (["interpolate", job.folder, "--data", wrong, "--out", "x.png"], "[9, 9, 1]"),
        (["demonstrate", "entropy", "--out", "x.png"], "what can be shown is wasserstein"),
    ]:
        done = call(*arguments)
        assert done.code == 2, done
        assert part in done.err
        assert done.err.strip().count("\n") == 0 or "━" in done.err


def test_a_mixture_on_the_codes_gives_densities_samples_and_outliers(job, call, tmp_path):
    assert call("encode", job.folder, "--data", job.data, "--split", "train,test", "--out", "codes").code == 0
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    done = call(*("train", "codes-mfa", "--out", "stage", "--set", uri, "--set", "scaling.workers=1"))
    assert done.code == 0, done.err
    scored = call("score", "stage", "--data", "codes", "--json")
    assert scored.code == 0, scored.err
    found = json.loads(scored.out)["stage"]
    uniform = -np.log(np.pi)  # of the prior, a disc: the codes are near it, and a mixture knows them better
    assert found["mean"] > uniform - 0.5
    assert call("outliers", "stage", "--data", "codes", "--out", "odd", "-n", "5").code == 0
    assert call("sample", "stage", "-n", "50", "--out", "z.npy").code == 0
    assert call("decode", job.folder, "z.npy", "--out", "x.npy").code == 0
    assert np.load(tmp_path / "x.npy").shape == (50, 8, 8, 1)
