"""The command line: output that scripts can read, and bad input answered in one line with exit code 2."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster import progress
from cluster.entry import leave_interrupted
from data import storage
from data.manifest import Manifest, Origin, SplitRecord, save_manifest
from data.shards import write_shard
from eval.scores import SCORES


def refuses(result, *parts):
    code, _, err = result
    lines = [line for line in err.splitlines() if "━" not in line and "-:--:--" not in line and line.strip()]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("manymodes: ")
    for part in parts:
        assert part in lines[0], err


@pytest.fixture
def images(tmp_path):
    """Two classes of small grey images."""
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(rng.integers(0, 255, (6, 6), dtype=np.uint8)).save(tmp_path / f"images/{label}/{i:02d}.png")
    return tmp_path / "images"


def test_help_and_recipes(call):
    code, out, _ = call("recipes")
    assert code == 0
    assert "digits" in out
    assert "mnist" in out


def test_evaluate_prints_one_json_object(call, array_file):
    rng = np.random.default_rng(0)
    reference, same = array_file(rng.random((600, 4)), "r.npy"), array_file(rng.random((500, 4)), "s.npy")
    code, out, err = call("evaluate", same, "--reference", reference, "--bins", 5, "--json", "--seed", 3)
    assert code == 0, err
    assert err == ""
    found = json.loads(out)
    assert {"ndb", "ndb_over_k", "js", "bins", "n_reference", "n_samples", "protocol"} <= found.keys()
    assert (found["bins"], found["n_reference"], found["n_samples"]) == (5, 600, 500)
    assert found["ndb"] <= 3  # two sets of one distribution: more has odds below 1e-4
    again = json.loads(call("evaluate", same, "--reference", reference, "--bins", 5, "--json", "--seed", 3)[1])
    assert again == found


def test_help_names_arguments_and_lists_every_score():
    from typer.testing import CliRunner

    from cluster.cli import app

    found = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).stdout
    assert all(name in found for name in ("SAMPLES", "REF", "FOLDER", *SCORES))
    assert "…" not in found


def test_a_place_where_nothing_is_names_what_there_may_be(call, array_file):
    code, _, err = call("evaluate", "nonexist.npy", "--reference", array_file(np.zeros((9, 2)), "r.npy"))
    assert code == 2
    assert err.strip().startswith("manymodes: nonexist.npy: nothing is there: check the path, or give shards")
    assert "models:/NAME@ALIAS" in err


def test_evaluate_finds_a_missing_mode_and_writes_a_report(call, array_file, tmp_path):
    rng = np.random.default_rng(0)
    modes = rng.normal(size=(6, 2)) * 30
    reference = array_file((modes[rng.integers(6, size=3000)] + rng.normal(size=(3000, 2))), "r.npy")
    samples = array_file((modes[rng.integers(5, size=3000)] + rng.normal(size=(3000, 2))), "s.npy")
    code, out, err = call(
        "evaluate", samples, "--reference", reference, "--bins", 6, "--z-threshold", 4, "--report", tmp_path / "r.html"
    )
    assert code == 0, err
    assert "missing" in out
    assert "NDB" in out
    assert "data:image/png" in (tmp_path / "r.html").read_text()


def test_evaluate_folder_of_images_against_its_pack(call, images, tmp_path):
    assert call("pack", f"images:{images}", tmp_path / "shards", "--set", "test_fraction=0.5")[0] == 0
    code, out, err = call(
        "evaluate", images, "--reference", tmp_path / "shards", "--bins", 3, "--json", "--z-threshold", 3
    )
    assert code == 0, err
    assert json.loads(out)["n_samples"] == 60


def test_pack_refusals(call, tmp_path, images, monkeypatch):
    refuses(call("pack", "digitz", "d"), "digitz", "digits")
    refuses(call("pack", f"images:{tmp_path}/nowhere", "d"), "nowhere")
    (tmp_path / "empty").mkdir()
    refuses(call("pack", f"images:{tmp_path}/empty", "d"), "empty")
    refuses(call("pack", "digits", "d", "--set", "sise=4"), "unknown field 'sise'", "did you mean 'size'")
    refuses(call("pack", "digits", "d", "--set", "size=[1"), "not valid YAML")
    refuses(call("pack", "digits", "pipe:cat >x"), "pipe")
    (images / "a" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    refuses(call("pack", f"images:{images}", "d"), "00.png")
    bad = np.ones((20, 3))
    bad[7, 1] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    refuses(call("pack", f"array:{tmp_path}/nan.npy", "d"), "NaN", "7")
    opened = storage.publish

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    refuses(call("pack", "digits", "d"), "disk is full")
    monkeypatch.undo()
    assert opened is storage.publish
    assert not list(tmp_path.glob("d/*")), "something was left half-written"


def test_evaluate_refusals(call, array_file, tmp_path):
    r = array_file(np.random.default_rng(0).random((100, 4)), "r.npy")
    refuses(call("evaluate", "nowhere.npy", "--reference", r), "nowhere.npy")
    refuses(call("evaluate", r, "--reference", r, "--bins", 200), "100", "200")
    few = array_file(np.zeros((3, 4)), "few.npy")
    refuses(call("evaluate", few, "--reference", r, "--bins", 10), "3", "10")
    wide = array_file(np.zeros((30, 5)), "wide.npy")
    refuses(call("evaluate", wide, "--reference", r, "--bins", 10), "wide.npy", "5", "4")
    bad = array_file(np.full((30, 4), np.nan), "bad.npy")
    refuses(call("evaluate", bad, "--reference", r, "--bins", 10), "NaN")
    refuses(call("evaluate", r, "--reference", r, "--z-threshold", 3, "--significance", 0.1), "not both")
    refuses(call("evaluate", r, "--reference", r, "--z-threshold", -1), "z")
    refuses(call("evaluate", "models:/nothing@candidate", "--reference", r), "no MLflow database")
    assert not (tmp_path / "mlflow.db").exists()
    refuses(call("evaluate", r, "--reference", r, "--max-samples", 0), "--max-samples")
    refuses(call("evaluate", r), "--reference")
    refuses(call("sample", "nowhere", "--out", "x.png"), "nowhere")
    refuses(call("sample", "nowhere", "--out", "x.gif"), ".png")
    refuses(call("sample", "nowhere", "--out", "x.npy", "-n", 10**9), "-n")
    refuses(call("evaluate", r, "--reference", r, "-n", 10**9), "-n")
    refuses(call("evaluate", r, "--reference", r, "--seed", 2**32), "--seed")
    huge = array_file(np.full((30, 4), 1e30), "huge.npy")
    refuses(call("evaluate", huge, "--reference", r, "--bins", 10), "huge.npy", "rescale")


def test_a_truncated_shard_is_refused(call, tmp_path):
    assert call("pack", "digits", tmp_path / "d")[0] == 0
    shard = next((tmp_path / "d").glob("test*.tar"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    refuses(call("evaluate", tmp_path / "d", "--reference", tmp_path / "d", "--bins", 10), shard.name)


def test_pack_never_replaces_a_pack_of_something_else_unasked(call, tmp_path, array_file):
    x = array_file(np.zeros((20, 3)))
    assert call("pack", "digits", tmp_path / "d")[0] == 0
    assert call("pack", "digits", tmp_path / "d")[0] == 0
    refuses(call("pack", f"array:{x}", tmp_path / "d"), "holds a pack of digits", "--replace")
    assert call("pack", f"array:{x}", tmp_path / "d", "--replace")[0] == 0


def test_another_scale_is_noticed(call, array_file):
    """Digits of 17 levels saved as 8-bit: 0 to 16 of 255."""
    from sklearn.datasets import load_digits

    samples = array_file(load_digits().images.astype(np.uint8)[..., None])
    code, _, err = call("evaluate", samples, "--reference", "digits", "--bins", 10, "--json")
    assert code == 0
    assert "warning" in err
    assert "same scale" in err


def test_recipe_fields_are_listed(call):
    import yaml

    code, out, _ = call("recipes", "digits")
    assert code == 0
    assert "# optimiser steps in all" in out
    assert yaml.safe_load(out)["training"]["steps"] == 300


def test_run_refusals_leave_nothing(call, tmp_path, images):
    refuses(call("run", "digitz", "--out", "o"), "digits")
    refuses(call("run", "digits", "--out", "o", "--set", "training.stepz=1"), "steps")
    refuses(call("run", "digits", "--out", "o", "--ray-address", "127.0.0.1:1"), "127.0.0.1:1", "--ray-address")
    refuses(call("run", "digits", "--out", "o", "--ray-address", "nonsense"), "nonsense")
    refuses(call("run", "digits", "--out", "o", "--set", "tracking.uri=ftp://x"), "ftp://x")
    refuses(call("run", "mnist", "--out", "o", "--set", f"data.source=mnist:{tmp_path}"), str(tmp_path))
    refuses(call("run", "digits", "--out", "o", "--set", "data.source=images:nowhere"), "nowhere")
    refuses(call("run", "digits", "--out", "o", "--set", "data.source=null"), "data", "shards")
    pack_only = ("--set", f"data.shards={tmp_path}/p", "--set", "data.source=null")
    refuses(call("run", "digits", "--out", "o", *pack_only), f"{tmp_path}/p")
    (images / "a" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    refuses(call("run", "digits", "--out", "o", "--set", f"data.source=images:{images}"), "00.png")
    assert not list(tmp_path.glob("o/**/*.*"))


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_what_listens_at_the_address_is_not_ray(call, monkeypatch, answer):
    monkeypatch.setattr("cluster.session.ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                if answer is None:
                    time.sleep(1)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        refuses(call("run", "digits", "--out", "o", "--ray-address", address), address, "does not answer")
        thread.join()
    for address in ("a" * 100 + ":9", ".:9", "127.0.0.1:9\n", "[::1"):
        refuses(call("run", "digits", "--out", "o", "--ray-address", address), "Ray a")


def test_data_that_cannot_be_judged_is_refused_before_training(call, tmp_path, array_file):
    x = array_file(np.random.default_rng(0).random((100, 4)))
    few = ("--set", f"data.source=array:{x}", "--set", "training.dequantise=false", "--set", "training.batch_size=8")
    refuses(call("run", "digits", "--out", "o", *few, "--set", "evaluation.bins.n_bins=50"), "test split", "50 bins")
    refuses(call("run", "digits", "--out", "o", *few, "--set", "data.options.test_fraction=0"), "no split 'test'")


def test_unreachable_mlflow_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    refuses(call("run", "digits", "--out", "o", "--set", "tracking.uri=http://127.0.0.1:1"), "http://127.0.0.1:1")
    assert not list(tmp_path.glob("o/**/*.*"))


def test_internal_errors_are_told_apart(call, monkeypatch):
    monkeypatch.setattr("cluster.recipe.shipped_recipes", lambda: 1 / 0)
    code, _, err = call("recipes")
    assert code == 1
    assert "internal error: ZeroDivisionError" in err
    with pytest.raises(ZeroDivisionError):
        call("recipes", "--debug")


@pytest.fixture
def small_model(tmp_path, digits_pack):
    """A mixture on the digits, as a run would leave it."""
    from trainer.checkpoint import save_model
    from trainer.initialise import initial_rows, initialise_mfa
    from trainer.models.mfa import MFA
    from trainer.settings import InitialisationSettings, TrainingSettings

    model = MFA(5, 64, 3, 1e-5)
    rows = initial_rows(digits_pack, TrainingSettings(), InitialisationSettings())
    initialise_mfa(model, rows, InitialisationSettings(noise_prior_count=5), seed=0)
    save_model(str(tmp_path / "run" / "model"), model, "mfa", digits_pack, dequantised=True)
    return "run"


def test_score_agrees_with_the_pack_and_writes_every_sample(call, small_model, digits_pack):
    """A pack and its source hold the same images; their dequantisation differs, by less than a standard error."""
    code, out, err = call("score", small_model, "--data", digits_pack.base, "--json", "--out", "values.csv")
    assert code == 0, err
    found = json.loads(out)["run"]
    assert found["n"] == 359
    lines = Path("values.csv").read_text().splitlines()
    assert lines[0] == "index,log_likelihood,component"
    values = [float(line.split(",")[1]) for line in lines[1:]]
    assert np.mean(values) == pytest.approx(found["mean"], abs=1e-3)
    code, out, err = call("score", small_model, "--data", "digits", "--json", "--picture", "pictures")
    assert code == 0, err
    assert json.loads(out)["run"]["mean"] == pytest.approx(found["mean"], abs=found["standard_error"])
    assert Image.open("pictures/likelihood.png").width > 300
    assert Image.open("pictures/reconstructions.png").width > 300
    code, out, _ = call("score", small_model, small_model, "--data", "digits")
    assert code == 0
    assert "log-likelihood (nats)" in out


def test_outliers_come_first(call, small_model):
    """An image of noise among digits is the least likely."""
    from sklearn.datasets import load_digits

    x = load_digits().images[:50].astype(np.uint8)[..., None]
    x[17] = np.random.default_rng(0).integers(0, 17, x[17].shape)
    folder = "shards"

    record = write_shard(f"{folder}/test-000000.tar", [{"x": x}], rows_per_block=20)
    split = SplitRecord(samples=50, shards=[record])
    save_manifest(
        Manifest(name="d", shape=(8, 8, 1), dtype="uint8", levels=17, source=Origin(spec="d"), splits={"test": split}),
        folder,
    )
    code, _, err = call("outliers", small_model, "--data", folder, "--out", "found", "-n", 5)
    assert code == 0, err
    rows = [line.split(",") for line in Path("found/outliers.csv").read_text().splitlines()]
    assert rows[0] == ["rank", "index", "log_likelihood", "component", "label"]
    assert rows[1][1] == "17"
    values = [float(row[2]) for row in rows[1:]]
    assert values == sorted(values)
    assert len(values) == 5
    assert Image.open("found/outliers.png").width > 300


@pytest.mark.parametrize("hide", ["left", "centre", "box:1,2,5,6", "random:0.3"])
def test_inpaint_fills_what_is_hidden(call, small_model, hide):
    code, _, err = call("inpaint", small_model, "--data", "digits", "--out", "x.npz", "--hide", hide, "--draws", 2)
    assert code == 0, err
    found = np.load("x.npz")
    hidden = found["hidden"]
    assert 0.05 < hidden.mean() < 0.6
    for name in ("map", "mean", "draw 1", "draw 2"):
        assert np.array_equal(found[name][~hidden], found["original"][~hidden])
        assert np.isfinite(found[name]).all()
    # Better than the best constant.
    error = np.square(found["mean"] - found["original"])[hidden].mean()
    assert error < found["original"][hidden].var()
    assert call("inpaint", small_model, "--data", "digits", "--out", "x.png", "--hide", hide)[0] == 0


def test_traverse_draws_components_and_an_animation(call, small_model):
    code, out, err = call("traverse", small_model, "--out", "pictures", "--component", 2, "--factors", 0, 2)
    assert code == 0, err
    assert Image.open("pictures/interpolation.gif").n_frames == 60
    assert "factors.png" in out


@pytest.fixture
def latent_model(tmp_path, digits_pack):
    """A generator with four Gaussians and a classifier of them, as a run would leave it."""
    from trainer.checkpoint import save_model
    from trainer.models.responsibility import ResponsibilityGAN

    torch.manual_seed(0)
    model = ResponsibilityGAN((8, 8, 1), 4, n_latent=3, width=4, bounded=True, encoder_width=4, encoder_hidden=8)
    save_model(str(tmp_path / "gan" / "model"), model, "responsibility", digits_pack, dequantised=False)
    return "gan", model


def test_traverse_shows_gaussians_and_what_lies_between_them(call, latent_model):
    place, _ = latent_model
    code, out, err = call("traverse", place, "--out", "pictures", "--component", 3)
    assert code == 0, err
    assert Image.open("pictures/interpolation.gif").n_frames == 4 * 8
    for name in ("gaussians.png", "paths.png", "triangle.png"):
        assert name in out
        assert Image.open(f"pictures/{name}").width > 300
    refuses(call("traverse", place, "--out", "p", "--component", 4), "0 to 3")
    refuses(call("traverse", place, "--out", "p", "--factors", 0, 1), "without factors")


def test_what_a_flow_has_no_pictures_or_components_of_is_refused(call, tmp_path, manifest_for):
    from trainer.checkpoint import save_model
    from trainer.models.flow import Flow

    flow = Flow((2,), n_components=2, n_couplings=2, width=4)
    save_model(str(tmp_path / "flow" / "model"), flow, "flow", manifest_for((2,)), dequantised=False)
    refuses(call("traverse", "flow", "--out", "p"), "family flow", "factor analysers")
    refuses(call("sample", "flow", "--component", 1, "--out", "x.npy"), "family flow")


def test_samples_of_one_component(call, latent_model, small_model):
    place, model = latent_model
    assert call("sample", place, "-n", 5, "--component", 2, "--out", "x.npy")[0] == 0
    expected = model.sample(5, torch.Generator().manual_seed(0), component=2)
    np.testing.assert_array_equal(np.load("x.npy").reshape(5, -1), expected.numpy())
    assert call("sample", small_model, "-n", 40, "--component", 1, "--out", "x.npy")[0] == 0
    assert call("sample", small_model, "-n", 40, "--out", "y.npy")[0] == 0
    assert np.load("x.npy").std(0).mean() < np.load("y.npy").std(0).mean()
    refuses(call("sample", place, "-n", 5, "--component", 4, "--out", "x.npy"), "0 to 3")
    refuses(call("sample", place, "-n", 5, "--out", "x.npy/y.npy"), "cannot hold")
    refuses(call("sample", place, "-n", 5, "--component", 1, "--out", "pack"), "a pack is of all")


def test_assign_tells_components_and_how_far_they_are_classes(call, latent_model, small_model, array_file):
    place, _ = latent_model
    code, out, err = call("assign", place, "--data", "digits", "--json", "--out", "all.npy")
    assert code == 0, err
    found, responsibilities = json.loads(out), np.load("all.npy")
    assert responsibilities.shape == (359, 4)
    assert found["sizes"] == np.bincount(responsibilities.argmax(1), minlength=4).tolist()
    assert 0 < found["accuracy"] <= found["purity"] <= 1
    assert call("assign", place, "--data", "digits", "--out", "all.csv")[0] == 0
    rows = [line.split(",") for line in Path("all.csv").read_text().splitlines()]
    assert rows[0] == ["index", "component", "responsibility", "label"]
    assert [int(row[1]) for row in rows[1:]] == responsibilities.argmax(1).tolist()
    assert {row[3] for row in rows[1:]} == {str(digit) for digit in range(10)}
    code, out, err = call("assign", small_model, "--data", "digits")
    assert code == 0, err
    assert "accuracy" in out
    unknown = array_file(np.random.default_rng(0).random((9, 8, 8, 1)).astype(np.float32))
    code, out, _ = call("assign", place, "--data", unknown)
    assert code == 0
    assert "accuracy" not in out
    labels = np.array([2**62, 5, 2**62, 10**9])  # identifiers, which no table has room for
    np.savez("identifiers.npz", x=np.random.default_rng(0).random((4, 8, 8, 1)).astype(np.float32), y=labels)
    code, out, err = call("assign", place, "--data", "identifiers.npz", "--json", "--split", "train")
    assert code == 0, err
    assert 0.5 <= json.loads(out)["purity"] <= 1
    refuses(call("assign", place, "--data", "digits", "--out", "x.txt"), ".csv")


def test_questions_refuse_in_one_line(call, small_model, array_file):
    refuses(call("score", "nowhere", "--data", "digits"), "no model")
    refuses(call("score", small_model, "--data", array_file(np.zeros((9, 8, 8, 1), np.float32))), "17 levels")
    refuses(call("score", small_model, "--data", array_file(np.zeros((9, 5), np.float32))), "shape [5]", "[8, 8, 1]")
    refuses(call("score", small_model, "--data", "digits", "--out", "x.txt"), ".csv")
    refuses(call("score", small_model, "--data", "digits", "--split", "dev"), "split")
    for hide in ("middle", "box:1,2", "box:5,5,2,9", "box:nan,0,1,1", "random:x", "random:0", "random:nan", "random:7"):
        refuses(call("inpaint", small_model, "--data", "digits", "--out", "x.png", "--hide", hide), hide)
    refuses(call("inpaint", small_model, "--data", "digits", "--out", "x.jpg"), ".png")
    refuses(call("traverse", small_model, "--out", "p", "--component", 5), "0 to 4")
    refuses(call("traverse", small_model, "--out", "p", "--factors", 0, 3), "0 to 2")


def test_too_little_memory_is_told_in_one_line(call, monkeypatch):
    def torch_fails():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. can't allocate memory: 800000000000 bytes")

    monkeypatch.setattr("cluster.recipe.shipped_recipes", torch_fails)
    refuses(call("recipes"), "not enough memory")


MANYMODES = os.path.join(os.path.dirname(sys.executable), "manymodes")


# Where the tests run in the background of a shell, Ctrl-C is ignored from the start.
READY_THEN_RUN = """
import signal, sys
from cluster import entry
signal.signal(signal.SIGINT, signal.default_int_handler)

class Ready:
    # Tells when the entry begins to import the commands: from then on it answers for interruptions.
    def find_spec(self, name, path=None, target=None):
        if name == "cluster.cli":
            print("ready", flush=True)

sys.meta_path.insert(0, Ready())
entry.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0, 2])
def test_an_interruption_is_one_line(array_file, number, after):
    """At once, while libraries are imported, and seconds later, at work."""
    x = array_file(np.random.default_rng(0).random((60_000, 100)))
    arguments = ["evaluate", x, "--reference", x, "--bins", "1000", "--n-init", "1000"]
    command = [sys.executable, "-c", READY_THEN_RUN, *arguments]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "ready\n"
        time.sleep(after)
        job.send_signal(number)
        _, err = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 130, err
    assert err.splitlines()[-1].startswith("manymodes: interrupted")
    assert "Traceback" not in err


RAY_THEN_SIGTERM = """
import os, signal, sys
from cluster.entry import leave_interrupted, prepare
from cluster.session import ray_session
prepare()
try:
    with ray_session(None, 1):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
except KeyboardInterrupt:
    leave_interrupted()
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "digits"], "; the same command goes on where it stopped"),
        (["evaluate", "run"], ""),
        (["submit", "digits"], "; a job that was submitted goes on: `manymodes jobs list` names it"),
    ],
)
def test_an_interruption_says_what_comes_of_it(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["manymodes", *arguments])
    with pytest.raises(SystemExit):
        leave_interrupted()
    assert capsys.readouterr().err == f"manymodes: interrupted{words}\n"


def test_a_log_is_told_how_far_a_stage_is(monkeypatch, capfd):
    monkeypatch.setattr(progress, "_TELL_SECONDS", 0.05)
    with progress.Stages().stage("train", total=10, unit="steps") as advance:
        advance(4, text="loss 1.5")
        time.sleep(0.5)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: 4 of 10 steps")]
    assert lines
    assert lines[-1].endswith("loss 1.5")


def test_sigterm_ends_a_job_that_runs_ray(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RAY_THEN_SIGTERM], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines() == ["manymodes: interrupted"]


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&- 2>&-", 0), ("<&- >&-", 0), (">/dev/full", 2), ("| true", None)]
)
def test_streams_that_are_closed_or_full(tmp_path, redirection, code):
    command = f"{MANYMODES} recipes {redirection}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert code is None or done.returncode == code
    expected = ["manymodes: cannot use the output: the disk is full: free some space or choose another folder"]
    assert done.stderr.splitlines() == (expected if code == 2 else [])


def test_names_are_printed_as_they_are(call, array_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = array_file(np.zeros((20, 3)))
    code, out, _ = call("pack", f"array:{x}", "o[red]x[/b]:smile:")
    assert code == 0
    assert "o[red]x[/b]:smile:" in out.replace("\n", "")
    refuses(call("pack", "array:a\nb\x1b[31m.npy", "d"), r"a\nb\x1b[31m.npy")
    done = subprocess.run(
        [MANYMODES, "pack", f"array:{x}", "é"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_places_that_cannot_be_written_are_refused_before_anything_is(call, small_model, tmp_path):
    (tmp_path / "found" / "outliers.png").mkdir(parents=True)
    refuses(call("outliers", small_model, "--data", "digits", "--out", "found"), "is a folder")
    assert not (tmp_path / "found" / "outliers.csv").exists()
    (tmp_path / "file").write_text("")
    refuses(call("traverse", small_model, "--out", "file"), "is a file")
    refuses(call("score", small_model, "--data", "digits", "--picture", "file"), "is a file")
    refuses(call("inpaint", small_model, "--data", "digits", "--out", "file/x.png"), "is a file")


def test_vectors_and_models_without_factors_are_shown_too(call, tmp_path, array_file, manifest_for):
    from trainer.checkpoint import save_model
    from trainer.models.mfa import MFA

    for features, factors in ((5, 2), (1, 0)):
        save_model(str(tmp_path / "vec" / "model"), MFA(2, features, factors), "mfa", manifest_for((features,)),
                   dequantised=False)  # fmt: skip
        x = array_file(np.random.default_rng(0).normal(0, 1, (40, features)).astype(np.float32))
        assert call("traverse", "vec", "--out", "shown")[0] == 0
        assert call("inpaint", "vec", "--data", x, "--hide", "random:1e-9", "--out", "x.png", "-n", 30)[0] == 0
        assert call("score", "vec", "--data", x, "--picture", "shown")[0] == 0
        assert call("outliers", "vec", "--data", x, "--out", "shown")[0] == 0
