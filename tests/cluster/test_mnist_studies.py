"""Studies of flows and of autoencoders on images, a few steps of each: what is measured, followed and drawn."""

import numpy as np
import pytest
from studied import SMALL, ran

from cluster import reproduce
from cluster.reproductions import REPRODUCTIONS
from cluster.reproductions.study import Column, Outcome, courses


def test_autoencoders_of_every_kind_in_one_table(tmp_path):
    study = REPRODUCTIONS["swae-mnist"]
    overrides = (*SMALL, "model.image=null", "training.batch_size=100", "training.checkpoint_every=2")
    outcomes, table = ran(study, ["SWAE, ring", "VAE", "WAE-GAN", "VAE-DFC"], tmp_path, overrides)
    found = outcomes["SWAE, ring"][0]
    assert {"prior_distance_ratio", "reconstruction_mse", "ndb", "frechet", "mode_score", "sharpness"} <= (
        found.metrics.keys()
    )
    assert found.metrics["prior_distance_ratio"] > 1
    assert not any(key.startswith("start/") for key in found.metrics)
    # Followed at each checkpoint, and at the end, where it is what was measured.
    assert list(found.followed) == [2, 3]
    assert found.followed[3]["prior_distance"] == pytest.approx(found.metrics["prior_distance"], rel=1e-6)
    assert found.drawn["grid"].shape == (25, 25, 8, 8, 1)
    assert found.drawn["codes"].shape == found.drawn["prior"].shape == (359, 2)
    titles = [figure.title for figure in study.figures(outcomes)]
    assert titles[0] == "Codes to prior over training"
    assert {"SWAE, ring: codes", "VAE: grid", "VAE-DFC: samples"} <= set(titles)
    assert len(table.cells()) == 4


def test_flows_and_mixtures_on_one_table(tmp_path):
    study = REPRODUCTIONS["thesis-mnist"]
    small = ("model.n_components=5", "training.em.iterations=3")
    outcomes, table = ran(study, ["MixFlow, ML", "DCGAN"], tmp_path)
    outcomes |= ran(study, ["MFA, diagonal noise"], tmp_path / "mfa", (*SMALL[:1], *small))[0]
    for label in ("MixFlow, ML", "MFA, diagonal noise"):
        metrics = outcomes[label][0].metrics
        assert metrics["log_likelihood"] > 0
        # By the number of levels that these pixels have, 17.
        assert metrics["bits"] == pytest.approx(np.log2(17) - metrics["log_likelihood"] / 64 / np.log(2))
    found = outcomes["DCGAN"][0].metrics
    assert {"ndb", "js", "mode_score", "sharpness"} <= found.keys()
    assert "log_likelihood" not in found
    assert found["sharpness"] < 0
    assert "Training curves" in [figure.title for figure in study.figures(outcomes)]
    assert len(table.cells()) == 2


def outcome(seed, value, followed=None):
    return Outcome(seed, {"gap": value}, [], [], 1.0, {}, followed or {})


def test_a_cell_tells_the_largest_and_what_is_not_finite():
    cell = [
        reproduce._cell(values, Column("gap", "gap", 2, largest=True))
        for values in ([1.0, 3.0], [1.0, float("inf")], [float("nan")], [])
    ]
    assert cell == ["2.00 ± 1.41 (largest 3.00)", "1.00 (1 of 2 not finite)", "– (1 of 1 not finite)", "–"]


def test_courses_are_of_all_seeds():
    outcomes = {"a": [outcome(0, 1, {2: {"d": 5.0}, 1: {"d": 3.0}}), outcome(1, 1, {1: {"d": 4.0}, 2: {"d": 6.0}})]}
    steps, values = courses({**outcomes, "b": [outcome(0, 1)]}, "d")["a"]
    assert steps == [1, 2]
    assert values.tolist() == [[3, 5], [4, 6]]
    assert list(courses({**outcomes, "b": [outcome(0, 1)]}, "d")) == ["a"]
