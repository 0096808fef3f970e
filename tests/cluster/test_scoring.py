"""Scores by Ray tasks, killed or not, are those of one process; and the commands around them."""

import io
import json
import os
import shutil
import signal
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from scored import FEW, blobs, run

from cluster.counting import ray_pass
from cluster.scoring import Taking, open_set, open_view, saved_table
from cluster.session import ray_session
from data import storage
from data.errors import UserError
from data.partitions import MemoryPartitions, Partitions, open_partitions
from eval.bins import BinSettings
from eval.comparison import judge_set
from eval.evaluate import Rule
from eval.measure import View, local_pass
from eval.reference import fit_reference
from eval.scores import ScoreSettings

SCORES = ScoreSettings(subsample=200)


@pytest.fixture(scope="module")
def two_workers(finished_job):  # a job needs to start Ray itself: it comes first
    # What is defined here travels whole: a worker cannot import this file, nor the helpers beside it.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ray_session(None, 2):
        yield


def no_view():
    return View()


class Killing(Partitions):
    """Kills the first process that reads partition 3."""

    def __init__(self, inner, mark):
        self.inner, self.mark = inner, mark
        for name in ("name", "levels", "scale", "shape", "keys", "seeds", "facts", "sizes"):
            setattr(self, name, getattr(inner, name))

    def pieces(self, number):
        if number == 3 and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from self.inner.pieces(number)


def scores_by(over_of, parts, samples):
    reference = fit_reference(parts, over_of(parts), [BinSettings(n_bins=10, n_init=1)], SCORES)
    row = judge_set(
        *(samples, over_of(samples), reference),
        name="gan",
        rule=Rule(),
        scores=SCORES,
        over_reference=over_of(parts),
        held_out=(samples, over_of(samples)),
    )
    return row.to_dict()


def test_workers_equal_one_process_and_a_killed_one_changes_nothing(two_workers, tmp_path, monkeypatch):
    monkeypatch.setattr("data.partitions._PARTITION_BYTES", 100 * 64 * 4)
    known = MemoryPartitions(blobs(1000), name="known", scale="0..1")
    samples = MemoryPartitions(blobs(600, 1), name="gan", scale="0..1")
    assert len(known) == 10
    alone = scores_by(local_pass, known, samples)
    together = scores_by(lambda parts: ray_pass(parts, no_view), known, samples)
    assert together == alone
    mark = str(tmp_path / "killed")
    killed = scores_by(lambda parts: ray_pass(parts, no_view), known, Killing(samples, mark))
    assert os.path.exists(mark)
    assert killed == alone


def test_a_fault_in_a_worker_is_one_line(two_workers):
    bad = MemoryPartitions(np.full((200, 4), np.nan, np.float32), name="gan", scale="0..1")
    known = MemoryPartitions(blobs(200).reshape(200, -1), name="known", scale="0..1")
    reference = fit_reference(known, local_pass(known), [BinSettings(n_bins=5, n_init=1)], ScoreSettings(()))
    with pytest.raises(UserError, match=r"^gan: .*NaN"):
        judge_set(bad, ray_pass(bad, no_view), reference, name="gan", rule=Rule(), scores=ScoreSettings(()))
    assert ray.is_initialized()


def test_a_model_is_judged_without_storing_its_samples(finished_job, two_workers):
    """The same draws by two workers and by one process; every partition has draws of its own."""
    taking = Taking(n=20_000, tracking_uri=finished_job.uri)
    drawn = open_set(finished_job.summary["model_uri"], taking)
    assert len(drawn) >= 2
    a, b = (next(drawn.pieces(number)).x for number in (0, 1))
    assert not np.array_equal(a[:100], b[:100])
    known = open_partitions(str(finished_job.folder / "shards"), split="train")
    settings = [BinSettings(n_bins=10, n_init=1)]
    reference = fit_reference(known, local_pass(known), settings, ScoreSettings(()))

    def judged(over):
        return judge_set(drawn, over, reference, name="m", rule=Rule(), scores=ScoreSettings(())).to_dict()

    assert judged(ray_pass(drawn, no_view)) == judged(local_pass(drawn))


def test_extractors_are_opened_once():
    assert open_view("pixels", None, None) is open_view("pixels", None, None)


def test_one_yardstick_for_many_evaluations(sets):
    fitted = run("reference", "known.npz", "--out", "ref", *FEW)
    assert fitted.exit_code == 0, fitted.exception
    results = {}
    for name in ("same.npy", "part.npy"):
        found = run("evaluate", name, "--reference", "ref", "--scores", "none", "--json")
        results[name] = json.loads(found.stdout)
        (sets / f"{name}.json").write_text(found.stdout)
    used = {result["protocol"]["bins_fingerprint"] for result in results.values()}
    assert len(used) == 1
    assert used.pop() in fitted.stdout
    table = run("compare", "same.npy.json", "part.npy.json")
    assert "same.npy" in table.stdout
    both = run("compare", "same.npy", "part.npy", "--reference", "ref", "--scores", "none", "--json")
    (sets / "both.json").write_text(both.stdout)
    rows = saved_table(["both.json", "same.npy.json"])
    assert [row[0] for row in rows.rows] == ["same.npy", "part.npy", "same.npy"]
    assert "p < 0.05" in rows.note
    low, high = results["same.npy"]["intervals"]["js"]
    assert rows.rows[0][5] == f"{low:.4f}–{high:.4f}"
    strict = run("evaluate", "same.npy", "--reference", "ref", "--scores", "none", "--json", "--z-threshold", 3)
    (sets / "strict.json").write_text(strict.stdout)
    with pytest.raises(UserError, match=r"different rules .*\|z\| > 3"):
        saved_table(["both.json", "strict.json"])
    other = run("evaluate", "same.npy", "--reference", "same.npy", *FEW, "--json")
    (sets / "other.json").write_text(other.stdout)
    refused = run("compare", "same.npy.json", "other.json")
    assert isinstance(refused.exception, UserError)
    assert "different bins" in str(refused.exception)


def test_shapes_are_matched_or_refused_with_the_remedy_before_anything_is_fitted(sets, monkeypatch):
    x = np.load("same.npy")
    np.save("bare.npy", x[..., 0])
    for reference in ("known.npz", "ref"):
        run("reference", "known.npz", "--out", "ref", *FEW)
        same, bare = (
            json.loads(run("evaluate", name, "--reference", reference, *FEW, "--json").stdout)
            for name in ("same.npy", "bare.npy")
        )
        assert bare["per_bin"] == same["per_bin"]
        assert bare["protocol"]["samples_reshaped_from"] == [8, 8]
    back = run("evaluate", "same.npy", "--reference", "bare.npy", *FEW)
    assert back.exit_code == 0, back.exception
    np.save("flat.npy", x.reshape(500, 64))
    np.save("colour.npy", np.random.default_rng(0).random((50, 32, 32, 3)).astype(np.float32))
    monkeypatch.setattr("cluster.scoring.fit_reference", None)
    refused = str(run("evaluate", "flat.npy", "--reference", "known.npz", *FEW).exception)
    assert "[n, 64], but the reference is [n, 8, 8, 1]: save them as x.reshape(-1, 8, 8, 1)" in refused
    for place in ("known.npz", "ref"):
        assert "give --size 8 --grey, " in str(run("evaluate", "colour.npy", "--reference", place, *FEW).exception)


def test_a_warning_where_pixels_use_little_of_their_range(sets):
    rng = np.random.default_rng(0)
    np.save("dim.npy", rng.integers(0, 17, (400, 8, 8)).astype(np.uint8))
    np.save("float.npy", (rng.integers(0, 17, (400, 8, 8)) / 255).astype(np.float32))
    found = run("evaluate", "dim.npy", "--reference", "dim.npy", *FEW, "--json")
    told = "values reach only 16 of 255, by which they are divided: if 16 is meant to be white"
    assert found.stderr.count(f"warning: dim.npy: {told}") == 2
    protocol = json.loads(found.stdout)["protocol"]
    assert protocol["samples_reach"].startswith(told)
    assert protocol["reference_reach"].startswith(told)
    found = run("evaluate", "float.npy", "--reference", "float.npy", *FEW, "--json")
    assert "reach" not in found.stderr + found.stdout


def test_several_numbers_of_bins_and_a_report_in_one_call(sets):
    found = run(
        *("compare", "same.npy", "part.npy", "--reference", "known.npz", "--bins", "5,10,15", "--n-init", 1),
        *("--subsample", 200, "--report", "r.html", "--json"),
    )
    assert found.exit_code == 0, found.exception
    rows = json.loads(found.stdout)
    assert [len(row["other_bins"]) for row in rows] == [2, 2]
    names = {score["name"] for score in rows[0]["scores"]}
    assert {"Fréchet distance (pixels)", "KID", "precision", "sliced Wasserstein", "Sinkhorn divergence"} <= names
    html = (sets / "r.html").read_text()
    assert "same.npy" in html
    assert json.loads((sets / "r.json").read_text()) == rows


def test_results_per_sample_and_the_missing_bins(sets):
    found = run(
        *("evaluate", "part.npy", "--reference", "known.npz", "--bins", 10, "--n-init", 1, "--scores", "manifold"),
        *("--subsample", 300, "--per-sample", "rows", "--export-missing", "missing", "--json"),
    )
    assert found.exit_code == 0, found.exception
    result = json.loads(found.stdout)
    rows = pq.read_table("rows").to_pydict()
    assert len(set(rows["key"])) == len(rows["key"]) == result["n_samples"]
    counts = np.bincount(rows["bin"], minlength=10)
    for entry in result["per_bin"]:
        assert counts[entry["bin"]] == round(entry["sample_proportion"] * result["n_samples"])
    assert min(rows["distance"]) >= 0
    assert all(key.startswith("train/") for key in rows["nearest_in_subset"])
    assert set(rows["label"]) == {None}
    missing = [e for e in result["per_bin"] if e["direction"] in ("missing", "fewer")]
    listed = pq.read_table("missing/missing.parquet").to_pydict()
    packed = open_partitions("missing/shards", split="train")
    assert missing
    assert set(listed["bin"]) == {entry["bin"] for entry in missing}
    assert packed.n == len(listed["key"]) == sum(round(e["reference_proportion"] * 1200) for e in missing)
    assert "choose another folder" in str(
        run("evaluate", "part.npy", "--reference", "known.npz", *FEW, "--per-sample", "rows").exception
    )
    # What was killed before its end is begun again.
    (sets / "rows" / "_per-sample.json").unlink()
    (sets / "rows" / "part-000000.parquet").write_bytes(b"half")
    (sets / "missing" / "shards" / "manifest.json").unlink()
    again = run(
        *("evaluate", "part.npy", "--reference", "known.npz", "--bins", 10, "--n-init", 1, "--scores", "manifold"),
        *("--subsample", 300, "--per-sample", "rows", "--export-missing", "missing", "--json"),
    )
    assert again.exit_code == 0, again.exception
    assert pq.read_table("rows").to_pydict() == rows
    assert open_partitions("missing/shards", split="train").n == packed.n


def test_what_cannot_be_done_is_refused_before_the_samples_are_read(sets, monkeypatch):
    """Scores that took hours must not be lost for the place of a file."""
    run("reference", "known.npz", "--out", "ref", *FEW)
    assert "a reference is there already" in str(run("reference", "same.npy", "--out", "ref", *FEW).exception)
    (sets / "rows").mkdir()
    (sets / "rows" / "_per-sample.json").touch()
    (sets / "folder").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("cluster.scoring.open_set", lambda *_: pytest.fail("samples were opened"))
        for more, words in (
            (("--z-threshold", "nan"), "z_threshold"),
            (("--significance", 1), "significance"),
            (("--report", "folder"), "folder"),
            (("--report", "same.npy/r.html"), "is a file"),
            (("--report", ""), "empty path"),
            (("--per-sample", "rows"), "choose another folder"),
            (("--per-sample", "same.npy"), "is a file"),
            (("--export-missing", "out"), "does not hold its samples"),
        ):
            refused = run("evaluate", "same.npy", "--reference", "ref", *more)
            assert isinstance(refused.exception, UserError), (more, refused.exception)
            assert words in str(refused.exception)
    whole = run(
        "evaluate", "known.npz", "--reference", "known.npz", *FEW, "--export-missing", "out", "--report", "r.html"
    )
    assert whole.exit_code == 0, whole.exception
    assert "none is missing: nothing is exported" in whole.output
    assert (sets / "r.html").exists()


def test_damaged_results_are_told(sets):
    run("reference", "known.npz", "--out", "ref", *FEW)
    saved = json.loads(run("evaluate", "same.npy", "--reference", "ref", "--json").stdout)
    cut = {**saved, "intervals": {**saved["intervals"], "js": []}}
    odd = {**saved, "protocol": {**saved["protocol"], "bins_fingerprint": [1]}, "threshold": [1]}
    (sets / "good.json").write_text(json.dumps(saved))
    for content in (json.dumps(cut), "[" * 200_000, json.dumps(odd)):
        (sets / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"bad\.json"):
            saved_table(["good.json", "bad.json"])
    refused = run("compare", "good.json", "--report", "r.html")
    assert "--report needs the samples" in str(refused.exception)


def test_a_fitted_reference_settles_how_scores_are_taken(sets):
    """Its subset and seed hold, whatever the defaults; flags that ask for others, or for its samples, are refused."""
    run("reference", "known.npz", "--out", "ref", "--bins", 10, "--n-init", 1, "--subsample", 200, "--scores", "kid")
    evaluate = ("evaluate", "same.npy", "--reference", "ref", "--json")
    found = json.loads(run(*evaluate, "--seed", 3).stdout)
    assert (found["protocol"]["pairs_subsample"], found["protocol"]["scores_seed"]) == (200, 0)
    told = {score["name"]: score for score in found["scores"]}
    assert told["KID"]["value"] is not None
    assert "fitted without it" in told["sharpness"]["reason"]
    assert "not at hand" in told["memorised"]["reason"]
    for more, words in (
        (("--scores", "sharpness"), "sharpness: the reference was fitted without it"),
        (("--subsample", 100), "fitted with --subsample 200"),
        (("--held-out", "part.npy"), "--held-out: copies are searched"),
    ):
        refused = run(*evaluate, *more)
        assert isinstance(refused.exception, UserError)
        assert words in str(refused.exception)


@pytest.mark.parametrize(("arguments", "words"), [
    (("--bins", "1"), "--bins"),
    (("--bins", "5,5"), "--bins"),
    (("--bins", "labels"), "no labels"),
    (("--scores", "fdi"), "unknown scores"),
    (("--features", "torchscript:none.pt"), "none.pt"),
    (("--features", "magic:x"), "magic"),
    (("--max-samples", "4"), "4 samples for 10 bins"),
    (("--z-threshold", "3", "--significance", "0.1"), "not both"),
])  # fmt: skip
def test_faults_are_one_line(sets, arguments, words):
    found = run("evaluate", "same.npy", "--reference", "same.npy", *FEW, *arguments)
    assert isinstance(found.exception, UserError), found.exception
    assert words in str(found.exception)
    assert "\n" not in str(found.exception)


@pytest.fixture
def two_models(sets, manifest_for):
    """Two mixtures of one data set, which differ in their weights alone."""
    from trainer.checkpoint import save_model
    from trainer.models.mfa import MFA

    for seed in (0, 1):
        torch.manual_seed(seed)
        model = MFA(3, 64, 2, 1e-3)
        torch.nn.init.normal_(model.means)
        save_model(f"run{seed}/model", model, "mfa", manifest_for((8, 8, 1)), dequantised=False)


def protocol_of(*arguments):
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.exception
    return json.loads(found.stdout)["protocol"]


def test_stored_statistics_belong_to_one_model(sets, two_models):
    """Models of the same data are told apart by their weights; one that was moved is the same."""
    arguments = ("--reference", "known.npz", *FEW, "-n", 500, "--json")
    stored = [json.loads(run("evaluate", f"run{i}", *arguments, "--store", "kept").stdout) for i in (0, 1)]
    alone = [json.loads(run("evaluate", f"run{i}", *arguments).stdout) for i in (0, 1)]
    assert stored == alone
    models = [result["protocol"]["samples_model"] for result in stored]
    assert stored[0]["per_bin"] != stored[1]["per_bin"]
    assert models[0] != models[1]
    files = len(list((sets / "kept").iterdir()))
    (sets / "run0").rename(sets / "moved")
    assert protocol_of("evaluate", "moved", *arguments[:-1], "--store", "kept")["samples_model"] == models[0]
    assert len(list((sets / "kept").iterdir())) == files


def test_touching_or_moving_a_file_changes_no_number(sets):
    arguments = ("--bins", 10, "--n-init", 1, "--subsample", 100, "--max-samples", 600, "--seed", 3, "--json")
    before = json.loads(run("evaluate", "same.npy", "--reference", "known.npz", *arguments).stdout)
    (sets / "elsewhere").mkdir()
    for name in ("same.npy", "known.npz"):
        shutil.copy(name, "elsewhere")
        os.utime(f"elsewhere/{name}", (1, 1))
    after = run("evaluate", "elsewhere/same.npy", "--reference", "elsewhere/known.npz", *arguments)
    after = json.loads(after.stdout)
    assert {score["name"] for score in after["scores"]} >= {"KID", "precision"}
    assert {**after, "name": ""} == {**before, "name": ""}


def test_what_is_held_out_is_never_the_reference_nor_the_samples(sets):
    """What has no splits holds nothing out; held-out data cannot be tested against itself."""
    few = ("--bins", 10, "--n-init", 1, "--subsample", 100, "--json")

    def judged(*arguments):
        found = json.loads(run("evaluate", *arguments, *few).stdout)
        return found["protocol"], {score["name"]: score for score in found["scores"]}["memorised"]

    for place in ("known.npz", "same.npy"):
        protocol, score = judged("part.npy", "--reference", place)
        assert score["value"] is None
        assert score["reason"] == protocol["memorisation"] == "no held-out data: name it by --held-out"
    protocol, score = judged("digits", "--reference", "digits")
    assert score["value"] is None
    assert score["reason"] == protocol["memorisation"] == "the samples are the held-out data"
    protocol, score = judged("part.npy", "--reference", "known.npz", "--held-out", "same.npy")
    assert (protocol["memorisation"], protocol["held_out"]) == ("against held-out data", "same")
    assert score["value"] is not None
    refused = run("evaluate", "part.npy", "--reference", "known.npz", *few, "--held-out", "known.npz")
    assert "held-out data that is in the reference" in str(refused.exception)


def test_the_protocol_says_what_decides_a_number(sets, two_models):
    """Also of a saved reference: how it was read, and which samples were clustered."""
    (sets / "png").mkdir()
    (sets / "f.py").write_text("def halves(x):\n    return x.reshape(len(x), -1)[:, ::2]\n")
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(f"png/{i}.png")
    few = ("--bins", 5, "--n-init", 1, "--subsample", 20, "--max-samples", 30, "--size", 8, "--grey", "--seed", 3)
    fitted = run("reference", "png", "--out", "ref", *few, "--scores", "fid")
    assert fitted.exit_code == 0, fitted.exception
    expected = {
        "samples_model": open_set("run0", Taking()).facts["model"], "samples_draws": 50, "samples_seed": 4,
        "reference_split": "train", "reference_size": 8, "reference_grey": True, "reference_crop": None,
        "reference_pairs_subsample": 20, "reference_scores_seed": 3, "seed": 3, "initialisations": 1,
        "scores": "fid", "pairs_subsample": 20, "scores_seed": 3,
        "memorisation": "not asked for",
    }  # fmt: skip
    found = protocol_of(*("evaluate", "run0", "--reference", "ref", "-n", 50, "--seed", 4, "--scores", "fid"))
    assert {key: found.get(key) for key in expected} == expected
    assert "30 samples" in found["kmeans_subset"]
    found = protocol_of(
        *("evaluate", "png", "--reference", "png", *few, "--scores", "fid", "--features", "module:f.py:halves")
    )
    assert found["features_preprocessing"] == "none"
    assert found["classifier_fingerprint"] == found["space_fingerprint"]
    assert (found["samples_split"], found["samples_size"]) == ("train", 8)


@pytest.mark.parametrize("place", ["run0", "pack", "same.npy"])
def test_options_that_would_be_ignored_are_refused(sets, two_models, place):
    from data.shards import pack
    from data.sources import open_source

    pack(open_source(f"array:{sets}/same.npy"), "pack")
    for option in (("--size", 4), ("--rgb",)):
        refused = run("evaluate", place, "--reference", "known.npz", *FEW, "-n", 100, *option)
        assert isinstance(refused.exception, UserError)
        assert str(refused.exception).startswith(f"{place}: samples of shape [8, 8, 1]")
    # What is so already may be asked for: one option serves samples and reference.
    accepted = run("evaluate", place, "--reference", "known.npz", *FEW, "-n", 100, "--size", 8, "--grey")
    assert accepted.exit_code == 0, accepted.exception


def test_a_space_is_its_content_and_not_its_name(sets):
    code = "def halves(x):\n    return x.reshape(len(x), -1)[:, ::2]\n\n\ndef others(x):\n    return -halves(x)\n"
    for name in ("a.py", "b.py"):
        (sets / name).write_text(code)
    fitted = run("reference", "known.npz", "--out", "ref", *FEW, "--features", "module:a.py:halves")
    assert fitted.exit_code == 0, fitted.exception
    for features, code in (("module:b.py:halves", 0), ("module:a.py:others", 1), ("pixels", 1)):
        found = run("evaluate", "same.npy", "--reference", "ref", "--scores", "none", "--features", features)
        assert found.exit_code == code, (features, found.exception)


def test_the_json_lies_beside_the_report_wherever_that_is(sets):
    found = run("evaluate", "same.npy", "--reference", "known.npz", *FEW, "--report", "memory://reports/x.html")
    assert found.exit_code == 0, found.exception
    assert json.loads(storage.read_bytes("memory://reports/x.json"))[0]["name"] == "same.npy"
    assert storage.read_bytes("memory://reports/x.html").startswith(b"<!")
    refused = run("evaluate", "same.npy", "--reference", "known.npz", *FEW, "--report", "x.json")
    assert "name an HTML file" in str(refused.exception)
    assert not (sets / "x.json").exists()


def test_samples_under_a_density(sets, two_models):
    """Mean, standard error and values per sample are those of `score`, whatever the place."""
    found = run(
        *("evaluate", "same.npy", "--reference", "known.npz", *FEW, "--density", "run0", "--per-sample", "rows"),
        "--json",
    )
    assert found.exit_code == 0, found.exception
    result = json.loads(found.stdout)
    scored = json.loads(run("score", "run0", "--data", "same.npy", "--out", "values.csv", "--json").stdout)["run0"]
    for key in ("mean", "standard_error", "n"):
        assert result["log_likelihood"][key] == pytest.approx(scored[key], rel=1e-9)
    values = {score["name"]: score["value"] for score in result["scores"]}
    assert values["log-likelihood"] == pytest.approx(scored["mean"], rel=1e-9)
    assert result["protocol"]["density_model"] == open_set("run0", Taking()).facts["model"]
    rows = pq.read_table("rows").to_pydict()
    values = np.loadtxt("values.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows["log_likelihood"], values[:, 1], rtol=1e-4)
    np.testing.assert_array_equal(rows["component"], values[:, 2])
    refused = run("evaluate", "same.npy", "--reference", "known.npz", *FEW, "--density", "same.npy")
    assert "no model there" in str(refused.exception)


def test_pixels_are_dequantised_for_a_density_of_them(sets, digits_pack):
    """As `score` does it of the same pack; what a model drew is put on its levels first."""
    from trainer.checkpoint import save_model
    from trainer.models.mfa import MFA

    torch.manual_seed(0)
    model = MFA(3, 64, 2, 1e-1)
    save_model("run/model", model, "mfa", digits_pack, dequantised=True)
    arguments = ("--reference", digits_pack.base, *FEW, "--density", "run", "--json")
    found = json.loads(run("evaluate", digits_pack.base, *arguments).stdout)["log_likelihood"]
    scored = json.loads(run("score", "run", "--data", digits_pack.base, "--json").stdout)["run"]
    assert found["bits_per_dimension"] == pytest.approx(scored["bits_per_dimension"], rel=1e-9)
    assert found["mean"] == pytest.approx(scored["mean"], rel=1e-9)
    drawn = json.loads(run("evaluate", "run", "-n", 4000, *arguments).stdout)["log_likelihood"]
    assert np.isfinite(drawn["mean"])
    refused = run("evaluate", "same.npy", "--reference", "known.npz", *FEW, "--density", "run")
    assert "real numbers" in str(refused.exception)


def test_empty_shards_and_labels_in_part_are_exported(sets):
    def add(tar, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    x = blobs(60, 1)
    (sets / "tars").mkdir()
    for number, rows in enumerate((range(40), (), range(40, 60))):
        with tarfile.open(sets / "tars" / f"s{number}.tar", "w") as tar:
            for row in rows:
                stream = io.BytesIO()
                np.save(stream, x[row])
                add(tar, f"{row}.npy", stream.getvalue())
                if number == 0:
                    add(tar, f"{row}.cls", b"3")
    found = run("evaluate", "tars", "--reference", "known.npz", *FEW, "--per-sample", "rows", "--json")
    assert found.exit_code == 0, found.exception
    rows = pq.read_table("rows").to_pydict()
    assert rows["label"] == [3] * 40 + [None] * 20
