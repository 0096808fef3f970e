"""Reproductions: a study ends in one table, goes on where it stopped, and repeats nothing."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster import reproduce
from cluster.recipe import load_recipe
from cluster.reproductions import REPRODUCTIONS
from data.errors import UserError
from data.manifest import load_manifest
from data.shards import pack
from data.sources import open_source
from eval import density_figures

SMALL = ("data.source=ring:6,samples=6000", "training.steps=20", "training.log_every=2", "training.checkpoint_every=6")


class Board:
    """Counts as the actor does, in this process; may stop a training."""

    def __init__(self, stop_at=None):
        self.stop_at, self.seen = stop_at, []
        self.count = SimpleNamespace(remote=self._count)

    def _count(self, name, done, text):
        self.seen.append(done)
        if done == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("label", ["MixFlow, ML", "PGAN"])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, label):
    study = REPRODUCTIONS["thesis-ring"]
    member = next(each for each in study.members if each.label == label)
    recipe = load_recipe(member.recipe, [*member.overrides, *SMALL])
    pack(open_source(recipe.data.source, recipe.data.options), str(tmp_path / "shards"))
    manifest = load_manifest(str(tmp_path / "shards"))

    def run(out, board):
        document = recipe.model_dump(mode="json")
        reproduce._run_one(study, member, document, manifest.base, 1, str(tmp_path / out), board, False)
        return reproduce._outcome(reproduce.member_folder(str(tmp_path / out), label, 1), 1)

    whole = run("whole", Board())
    with pytest.raises(KeyboardInterrupt):
        run("cut", Board(stop_at=14))
    board = Board()
    cut = run("cut", board)
    assert min(board.seen) == 14  # from the checkpoint at 12 on
    assert cut.metrics == pytest.approx(dict(whole.metrics), rel=1e-5)
    assert (cut.steps, len(cut.curve)) == (whole.steps, 10)
    np.testing.assert_allclose(cut.drawn["x"], whole.drawn["x"], rtol=1e-4, atol=1e-5)
    board = Board()
    run("cut", board)
    assert board.seen == [recipe.training.length]  # nothing was trained again


@pytest.mark.parametrize("harm", ["[]", "{", '{"identity": 1}', None])
def test_a_damaged_result_is_made_again(tmp_path, harm):
    folder = tmp_path / "member"
    folder.mkdir()
    result = {"identity": "i", "metrics": {}, "steps": [], "curve": [], "seconds": 1.0}
    (folder / "result.json").write_text(json.dumps(result))
    np.savez(folder / "drawn.npz", x=np.zeros(2))
    found = reproduce._done(str(folder), 3, "i")
    assert (found.seed, found.followed) == (3, {})
    assert reproduce._done(str(folder), 3, "another") is None
    if harm is None:
        (folder / "drawn.npz").write_bytes((folder / "drawn.npz").read_bytes()[:40])
    else:
        (folder / "result.json").write_text(harm)
    assert reproduce._done(str(folder), 3, "i") is None
    (folder / "drawn.npz").unlink()
    assert reproduce._done(str(folder), 3, "i") is None


def test_what_a_member_lacks_is_not_given_to_it():
    study = REPRODUCTIONS["thesis-ring"]
    for label, override, parts in (
        ("MixFlow, ML", "model.adversarial.gradient_penalty=1", ["has no model.adversarial", "--only"]),
        ("GAN", "model.couplings=1", ["member 'GAN'", "unknown field", "--only"]),
    ):
        member = next(each for each in study.members if each.label == label)
        with pytest.raises(UserError) as caught:
            reproduce._recipe(member, [override])
        assert all(part in str(caught.value) for part in parts), caught.value
        assert "\n" not in str(caught.value)
    assert len(reproduce._chosen(study, ["GAN", "PGAN", "GAN"])) == 2


def test_a_study_ends_in_its_table_and_is_done_once(call, tmp_path):
    arguments = ["reproduce", "thesis-ring", "--seeds", 2, "--workers", 2, "--out", "r", "--only", "single flow, ML"]
    arguments += ["--only", "WGAN-GP", *(part for key in SMALL for part in ("--set", key))]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "single flow, ML" in out
    rows = list(csv.DictReader((tmp_path / "r" / "table.csv").open()))
    assert [(row["member"], row["seed"]) for row in rows] == [
        *(("single flow, ML", "0"), ("single flow, ML", "1"), ("WGAN-GP", "0"), ("WGAN-GP", "1")),
    ]
    assert float(rows[0]["gap"]) < float(rows[0]["start/gap"])
    assert rows[2]["gap"] == ""
    text = (tmp_path / "r" / "table.md").read_text()
    assert "| 968.70 / 300 | 2 |" in text
    for name in ("samples-and-densities.png", "critics.png", "training-curves.png", "report.html"):
        assert (tmp_path / "r" / name).stat().st_size > 1000
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").glob("*/*/result.json")}
    assert len(results) == 4

    code, _, err = call(*arguments)
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in results} == results
    code, _, err = call("reproduce", "thesis-ring", "--only", "nobody")
    assert code == 2
    assert "choose among single flow, ML" in err
    assert call("reproduce", "nothing")[0] == 2


def test_the_children_of_a_study_are_in_mlflow(call, tmp_path):
    from mlflow.tracking import MlflowClient

    arguments = ["reproduce", "thesis-critics", "--seeds", 1, "--out", "r", "--only", "weight clipping"]
    code, _, err = call(*arguments, "--set", "training.steps=4", "--set", "training.log_every=2")
    assert code == 0, err
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("manymodes").experiment_id])
    child, parent = sorted(runs, key=lambda run: "mlflow.parentRunId" not in run.data.tags)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics["weight"] == pytest.approx(0.01)
    assert "study/table.md" in {item.path for item in client.list_artifacts(parent.info.run_id, "study")}


def test_a_critic_alone_is_trained_between_data_and_noisy_data(tmp_path):
    study = REPRODUCTIONS["thesis-critics"]
    recipe = load_recipe("ring-wgan-gp", ["data.source=seven", "scaling.workers=1"])
    manifest = pack(open_source("seven"), str(tmp_path / "shards"))
    model = recipe.model.build(manifest)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = study.objective(recipe)(model, manifest, recipe.training)
    assert objective.turns(0) == ["critic"] * 5
    x = torch.from_numpy(next(open_source("seven").blocks("train", 1500))["x"])
    loss, scalars = objective.loss("critic", {"x": x})
    assert loss.requires_grad
    assert "gap" in scalars
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_curves_and_panels_bear_what_is_not_finite():
    steps, values = [1, 2, 3], np.array([[3.0, np.nan, 1.0], [2.0, np.inf, 1.5]])
    assert density_figures.training_curves({"a": (steps, values)}, label="nats")[:4] == b"\x89PNG"
    extent = np.array([[0.0, 1.0], [0.0, 1.0]])
    drawn = {"extent": extent, "x": np.zeros((2, 2)), "density": np.full((4, 4), -np.inf)}
    assert density_figures.density_panels([density_figures.Panel("a", drawn)])[:4] == b"\x89PNG"


def test_recipes_of_all_studies_are_read():
    for study in REPRODUCTIONS.values():
        labels = [member.label for member in study.members]
        assert len(set(labels)) == len(labels)
        for member in (*study.prerequisites, *study.members):
            assert json.loads(reproduce._recipe(member, ()).model_dump_json())["name"]
