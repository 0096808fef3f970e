"""The main job, for real: embedded Ray, two workers, parallel sub-mixtures, MLflow on SQLite; and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cluster.hierarchy import flatten
from trainer.checkpoint import load_model


def test_summary_names_everything(finished_job):
    s = finished_job.summary
    assert s["model_uri"] == "models:/digits-mfa@candidate"
    assert os.path.exists(s["report"])
    assert set(s["metrics"]) >= {"ndb", "ndb_over_k", "js", "test_log_likelihood", "test_log_likelihood_se"}
    assert {"start and stop workers", "train root mixture", "train sub-mixtures", "evaluate"} <= set(s["seconds"])
    rows = {row["name"]: row for row in s["models"]}
    assert next(iter(rows)) == "held-out data"
    hierarchical = next(row for name, row in rows.items() if name.startswith("hierarchical"))
    assert hierarchical["protocol"]["bins_fingerprint"] == rows["held-out data"]["protocol"]["bins_fingerprint"]
    assert hierarchical["ndb"] <= 3


def test_hierarchical_beats_root_and_gaussian(finished_job):
    likelihood = {r["name"]: r["log_likelihood"] for r in finished_job.summary["models"] if r["log_likelihood"]}
    best = next(v["mean"] for name, v in likelihood.items() if name.startswith("hierarchical"))
    assert all(best > v["mean"] for name, v in likelihood.items() if not name.startswith("hierarchical"))


def test_report_is_one_file_with_pictures(finished_job):
    html = (finished_job.folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 5
    assert "http://" not in html
    assert "https://" not in html


def test_mlflow_run_is_finished_and_complete(finished_job):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(finished_job.uri)
    run = client.get_run(finished_job.summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/ndb"] == finished_job.summary["metrics"]["ndb"]
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 40
    assert run.data.params["training.steps"] == "400"
    assert run.data.tags["version.torch"].startswith("2.")
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    assert {"report.html", "summary.json"} <= {item.path for item in client.list_artifacts(run.info.run_id)}
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "pictures")]
    assert len(pictures) >= 4
    assert all(path.endswith(".png") for path in pictures)
    assert list(Path(run.data.tags["checkpoints"]).glob("*/*/state.safetensors"))


def test_flat_mixture_multiplies_the_mixing_coefficients(finished_job):
    work = next((finished_job.folder / "work").iterdir())
    root, _ = load_model(str(work / "root" / "model"))
    folders = {int(p.name[-5:]): str(p) for p in (work / "split").glob("component-*")}
    flat = flatten(str(work / "root" / "model"), folders, 60)
    assert flat.mixing_logits.detach().double().softmax(0).sum().item() == pytest.approx(1, abs=1e-12)
    sizes = [json.loads((work / "split" / f"component-{k:05d}" / "result.json").read_text()) for k in sorted(folders)]
    assert flat.n_components == sum(size["n_components"] for size in sizes)
    assert sum(size["samples"] for size in sizes) == 1438  # every training sample was routed once
    counts = [size["n_components"] for size in sizes]
    shares = torch.stack([part.sum() for part in flat.mixing_coefficients.split(counts)])
    assert torch.allclose(shares, root.mixing_coefficients, atol=1e-6)
    assert flat.mixing_coefficients.sum().item() == pytest.approx(1, abs=1e-12)


def test_registered_model_samples_and_evaluates(finished_job, monkeypatch, capfd, tmp_path):
    from cluster import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["manymodes", *map(str, arguments)])
        _quietly(cli.main)
        return capfd.readouterr().out

    uri = finished_job.summary["model_uri"]
    call("sample", uri, "-n", 50, "--out", tmp_path / "a.npy", "--tracking-uri", finished_job.uri)
    call("sample", finished_job.folder, "-n", 50, "--out", tmp_path / "b.npy")
    call("sample", uri, "-n", 50, "--out", tmp_path / "c.png", "--tracking-uri", finished_job.uri)
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert a.shape == (50, 8, 8, 1)
    assert np.array_equal(a, b)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    out = call(
        *("evaluate", uri, "--reference", finished_job.folder / "shards", "--bins", 20, "-n", 2000),
        *("--z-threshold", 3, "--json", "--tracking-uri", finished_job.uri),
    )
    assert json.loads(out)["ndb"] <= 3


def test_run_and_evaluate_share_one_protocol(finished_job):
    """The demo's row and a later `evaluate` of the same held-out data are the same score, to the last digit."""
    from data.partitions import open_partitions
    from eval.bins import BinSettings
    from eval.comparison import judge_set
    from eval.evaluate import Rule
    from eval.measure import local_pass
    from eval.reference import Reference, fit_reference
    from eval.scores import ScoreSettings

    then = finished_job.summary["models"][0]
    known, held = (open_partitions(str(finished_job.folder / "shards"), split=split) for split in ("train", "test"))
    kept = Reference.load(str(finished_job.folder / "reference"))
    anew = fit_reference(known, local_pass(known), [BinSettings(n_bins=20)], ScoreSettings(()))
    for reference in (kept, anew):
        row = judge_set(held, local_pass(held), reference, name="held", rule=Rule(3.0), scores=ScoreSettings(()))
        now = row.to_dict()
        for key in ("bins_fingerprint", "reference_fingerprint", "reference"):
            assert now["protocol"][key] == then["protocol"][key]
        assert (now["ndb"], now["js"]) == (then["ndb"], then["js"])


def test_a_changed_source_is_packed_again(tmp_path):
    from cluster.fitting import _packed
    from cluster.recipe import load_recipe

    recipe = load_recipe("digits", [f"data.source=array:{tmp_path}/x.npy"])

    def packed():
        return _packed(recipe, str(tmp_path / "out"), lambda *a, **k: None)

    np.save(tmp_path / "x.npy", np.zeros((50, 4)))
    first = packed()
    assert packed().fingerprint == first.fingerprint
    np.save(tmp_path / "x.npy", np.ones((50, 7)))
    second = packed()
    assert second.shape == (7,)
    assert second.fingerprint != first.fingerprint


def test_one_process_per_output_folder(tmp_path):
    from cluster.job import exclusive
    from data.errors import UserError

    with exclusive(str(tmp_path)), pytest.raises(UserError, match="another job"), exclusive(str(tmp_path)):
        pass
    with exclusive(str(tmp_path)):
        pass


def test_routing_is_exactly_once(finished_job):
    """The components' shards together hold the training set, as a multiset."""
    from data.manifest import load_manifest
    from data.stream import read_blocks

    work = next((finished_job.folder / "work").iterdir())
    manifest = load_manifest(str(finished_job.folder / "shards"))
    rows = [b["x"].reshape(len(b["x"]), -1) for b in read_blocks(manifest, "train", raw=True)]
    routed = [
        b["x"].reshape(len(b["x"]), -1)
        for place in sorted((work / "split").glob("component-*"))
        for b in read_blocks(load_manifest(str(place)), "train", raw=True)
    ]
    expected, found = np.concatenate(rows), np.concatenate(routed)
    assert np.array_equal(expected[np.lexsort(expected.T)], found[np.lexsort(found.T)])


def _quietly(main):
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code


TRAIN = """
import sys
from cluster.fitting import train_job
from cluster.recipe import load_recipe
train_job(load_recipe("digits", sys.argv[3:] + ["tracking.uri=" + sys.argv[2]]), sys.argv[1], quiet=True)
"""


def start(folder, uri, overrides):
    return subprocess.Popen([sys.executable, "-c", TRAIN, str(folder), uri, *overrides], stderr=subprocess.PIPE)


def wait_for(what, process, seconds=90):
    """Polls until `what()` is true; fails if the process ends before or time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        if process.poll() is not None:
            pytest.fail(f"the job ended too early: {process.stderr.read().decode()[-2000:]}")
        time.sleep(0.05)
    pytest.fail("nothing happened in time")


def workers_of(process):
    names = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(child.cmdline()):
                names.append(child)
        except psutil.Error:
            continue
    return names


def steps_logged(uri):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (run,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


def test_killed_worker_and_killed_driver_change_nothing(finished_job, tmp_path):
    """A worker is killed in the middle, then the whole job; the same command ends with the same weights."""
    # Slowed down by many small checkpoints only (7 steps are no whole epoch): the numbers are those of the other job.
    overrides = [*finished_job.overrides, "training.checkpoint_every=7", "training.log_every=1"]
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path}/mlflow.db"

    def checkpoints():
        return sorted(out.glob("work/*/root/checkpoints/*/step_*/checkpoint.json"))

    job = start(out, uri, overrides)
    try:
        # Not the first one: Ray Train commits a checkpoint a moment after it is written.
        wait_for(lambda: checkpoints() and checkpoints()[-1].parent.name >= "step_00000028", job)
        victims = wait_for(lambda: workers_of(job), job)
        last = checkpoints()[-1].parent.name
        os.kill(victims[0].pid, signal.SIGKILL)
        wait_for(lambda: checkpoints() and checkpoints()[-1].parent.name > last and len(workers_of(job)) == 2, job)
        job.kill()
        job.wait(timeout=30)
        assert not (out / "model").exists()
        identity = json.loads((out / "job.json").read_text())["id"]
        again = start(out, uri, overrides)
        _, errors = again.communicate(timeout=120)
        assert again.returncode == 0, errors.decode()[-2000:]
    finally:
        job.kill()
        job.wait(timeout=30)
    assert json.loads((out / "job.json").read_text())["id"] == identity
    logged = steps_logged(uri)
    # Every step was logged; those between a checkpoint and a kill twice or thrice, those before it once: it resumed.
    assert set(logged) == set(range(1, 401))
    assert logged.count(1) == 1
    expected, _ = load_model(str(finished_job.folder / "model"))
    resumed, _ = load_model(str(out / "model"))
    for name, value in expected.state_dict().items():
        assert torch.allclose(value, resumed.state_dict()[name], atol=1e-5), name


def test_a_damaged_shard_ends_the_job_with_its_name(tmp_path, digits_pack):
    """One rank meets it, in the middle of training; the others must not wait, nor the job be tried for ever."""
    import shutil

    shutil.copytree(digits_pack.base, tmp_path / "shards")
    shard = tmp_path / "shards" / digits_pack.splits["train"].shards[0].file
    content = bytearray(shard.read_bytes())
    content[digits_pack.splits["train"].shards[0].members[2][1]["x.npy"][0] + 200] ^= 255
    shard.write_bytes(content)
    overrides = [f"data.shards={tmp_path}/shards", "data.source=null", "scaling.timeout_seconds=60"]
    # Initialised from few rows, so that the damage is met in training.
    job = start(tmp_path / "out", f"sqlite:///{tmp_path}/m.db", [*overrides, "initialisation.max_samples=100"])
    _, errors = job.communicate(timeout=120)
    last = errors.decode().strip().splitlines()[-1]
    assert job.returncode != 0
    assert "UserError" in last
    assert shard.name in last


def test_a_job_by_em_with_polish(tmp_path):
    """Root, sub-mixtures and the flat model by EM; every sub-mixture has a child run, and a line in one table."""
    from mlflow.tracking import MlflowClient

    from cluster.pipeline import run_job
    from cluster.recipe import load_recipe

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    em = "{method: em, em: {iterations: 6, tolerance: null}}"
    changes = [
        *(f"tracking.uri={uri}", "evaluation.baselines=[]", f"training={em}", "model.n_components=4"),
        *("hierarchy.method=em", "hierarchy.em.iterations=5", f"hierarchy.polish={em}"),
        *("hierarchy.noise_prior_count=5", "hierarchy.noise_prior_smoothing=1", "initialisation.noise_prior_count=1"),
    ]
    summary = run_job(load_recipe("digits", changes), str(tmp_path / "out"), quiet=True)
    root, final = (row["log_likelihood"]["mean"] for row in summary["models"][1:])
    assert final > root + 5
    work = next((tmp_path / "out" / "work").iterdir())
    flat, polished = load_model(str(work / "flat"))[0], load_model(str(work / "polish" / "model"))[0]
    assert torch.equal(load_model(str(tmp_path / "out" / "model"))[0].means, polished.means)
    for model in (flat, polished):
        assert model.mixing_coefficients.sum().item() == pytest.approx(1, abs=1e-12)
    history = json.loads((work / "polish" / "result.json").read_text())["history"]
    assert len(history) == 6
    assert history[-1][1] < history[0][1]
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    children = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{summary['mlflow_run_id']}'")
    assert len(children) == 4
    assert sum(run.data.metrics["n_components"] for run in children) == flat.n_components
    table = Path(client.download_artifacts(summary["mlflow_run_id"], "sub-mixtures.csv")).read_text().splitlines()
    assert table[0] == "component,samples,n_components,log_likelihood,seconds"
    assert sum(int(line.split(",")[1]) for line in table[1:]) == 1438
