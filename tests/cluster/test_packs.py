"""Features and draws that are written once are judged as those that are computed anew."""

import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from scored import run

from data.errors import UserError
from data.manifest import load_manifest
from data.partitions import open_partitions
from trainer.checkpoint import save_model
from trainer.models.mfa import MFA

CODE = """
import numpy as np

def halves(x):
    features = np.tanh(x.reshape(len(x), -1)[:, ::2])
    return features, 9 * features[:, :3]

def broken(x):
    return x.reshape(len(x), -1) * (np.nan if float(x.sum()) > 1640 else 1)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.partitions._PARTITION_BYTES", 100 * 64 * 4)
    (tmp_path / "f.py").write_text(CODE)
    rng = np.random.default_rng(0)
    known, y = rng.random((1000, 8, 8, 1), np.float32), np.arange(1000) % 3
    np.savez("known.npz", x=0.5 * known + 0.2 * y[:, None, None, None].astype(np.float32), y=y)
    np.save("x.npy", rng.random((500, 8, 8, 1), np.float32))
    return tmp_path


def judged(samples, reference, *arguments):
    found = run(
        *("evaluate", samples, "--reference", reference, "--bins", 10, "--n-init", 2, "--subsample", 2000, "--json"),
        *("--scores", "fid,kid,manifold,transport,classes", *arguments),
    )
    assert found.exit_code == 0, found.exception
    result = json.loads(found.stdout)
    return result, {score["name"].partition(" (")[0]: score["value"] for score in result["scores"]}


def test_a_pack_of_features_is_judged_as_the_images_are(here):
    for name in ("known.npz", "x.npy"):
        written = run("features", name, "--features", "module:f.py:halves", "--out", f"{name}.pack", "--split", "train")
        assert written.exit_code == 0, written.exception
    pack = load_manifest("known.npz.pack")
    assert (pack.shape, pack.n_samples("train"), len(pack.splits["train"].shards)) == ((32,), 1000, 10)
    parts = open_partitions("known.npz.pack", split="train")
    labels = [piece.label for number in range(len(parts)) for piece in parts.pieces(number)]
    np.testing.assert_array_equal(np.concatenate(labels), np.arange(1000) % 3)
    direct, scores = judged("x.npy", "known.npz", "--features", "module:f.py:halves")
    packed, others = judged("x.npy.pack", "known.npz.pack", "--split", "train")
    for key in ("ndb", "bins", "n_samples", "n_reference"):
        assert packed[key] == direct[key]
    assert packed["js"] == pytest.approx(direct["js"], abs=1e-12)
    assert others.keys() == scores.keys()
    assert scores.keys() >= {"Fréchet distance", "KID", "precision", "sliced Wasserstein", "Inception score"}
    for name, value in scores.items():
        # The Inception score's ten splits are random, and a shard has random numbers of its own.
        assert others[name] == pytest.approx(value, rel=0.02 if name == "Inception score" else 1e-5), name
    origin = packed["protocol"]["samples_packing"]
    assert (origin["features"], origin["fingerprint"]) == (
        direct["protocol"]["space"], direct["protocol"]["space_fingerprint"]
    )  # fmt: skip


def test_workers_write_the_same_bytes_and_a_failure_leaves_nothing(here):
    arguments = ("--features", "module:f.py:halves", "--split", "train")
    run("features", "x.npy", *arguments, "--out", "one")
    together = run("features", "x.npy", *arguments, "--out", "two", "--workers", 2)
    assert together.exit_code == 0, together.exception
    assert not ray.is_initialized()
    assert load_manifest("one").model_dump() == load_manifest("two").model_dump()
    assert "already" in str(run("features", "x.npy", *arguments, "--out", "one").exception)
    twice = run("features", "x.npy", "--features", "pixels", "--split", "train,test", "--out", "three")
    assert "each once" in str(twice.exception)
    failed = run("features", "x.npy", "--features", "module:f.py:broken", "--out", "four")
    assert isinstance(failed.exception, UserError), failed.exception
    assert "NaN" in str(failed.exception)
    assert not list((here / "four").iterdir())


def test_a_pack_of_draws_is_the_same_by_any_workers_and_judged_as_the_model(here, manifest_for, monkeypatch):
    torch.manual_seed(0)
    save_model("run0/model", MFA(3, 64, 2, 1e-3), "mfa", manifest_for((8, 8, 1)), dequantised=True)
    monkeypatch.setattr("eval.drawn._PARTITION_VALUES", 100 * 64)
    for out, more in (("alone", ()), ("shared", ("--workers", 2))):
        written = run("sample", "run0", "-n", 450, "--seed", 3, "--out", out, *more)
        assert written.exit_code == 0, written.exception
    names = sorted(path.name for path in Path("alone").iterdir())
    assert names == ["manifest.json", *(f"test-{number:06d}.tar" for number in range(5))]
    assert all((Path("alone") / name).read_bytes() == (Path("shared") / name).read_bytes() for name in names)
    judged = [
        json.loads(
            run("evaluate", place, "--reference", "known.npz", "--bins", 10, "-n", 450, "--seed", 3, "--json").stdout
        )
        for place in ("alone", "run0")
    ]
    assert judged[0]["js"] == judged[1]["js"]
    refused = run("sample", "run0", "-n", 450, "--out", "alone")
    assert "files are there already" in str(refused.exception)
    assert "give a folder" in str(run("sample", "run0", "--out", "x.npy", "--workers", 2).exception)
