"""Studies of responsibility learning, a few steps of each: what is measured and drawn, and what is missing."""

from dataclasses import replace

import numpy as np
import pytest
from studied import ran

from cluster.reproductions import REPRODUCTIONS
from cluster.reproductions.digits import missing_digits
from cluster.reproductions.study import Member

SMALL_MFA = ("hierarchy=null", "model.n_components=5", "training.em.iterations=3")


def test_clusters_samples_and_ways_between_gaussians(tmp_path):
    study = REPRODUCTIONS["responsibility-mnist"]
    labels = ["responsibility GAN", "DeLiGAN", "MFA, K=10"]
    outcomes, table = ran(study, labels, tmp_path)
    found = outcomes["responsibility GAN"][0]
    assert {"accuracy", "information", "purity", "used", "frechet", "ndb", "sample_purity"} <= found.metrics.keys()
    assert 0 <= found.metrics["told"] <= 1
    assert 0.1 <= found.metrics["accuracy"] <= found.metrics["purity"] <= 1
    assert found.metrics["kmeans_accuracy"] > 0.6
    assert "start/accuracy" in found.metrics
    assert outcomes["MFA, K=10"][0].metrics["accuracy"] > 0.5
    assert "accuracy" not in outcomes["DeLiGAN"][0].metrics
    assert 0.1 <= outcomes["DeLiGAN"][0].metrics["least_sample_purity"] <= 1
    assert [found.drawn[key].shape for key in ("each", "paths", "triangle")] == [
        *((100, 8, 8, 1), (100, 8, 8, 1), (81, 8, 8, 1)),
    ]
    assert (found.drawn["triangle"][1] == 1).all()  # right of the upper corner there is nothing
    titles = [figure.title for figure in study.figures(outcomes)]
    assert "responsibility GAN: three Gaussians" in titles
    assert "Gaussians in use" in titles
    assert len(table.cells()) == 3


def test_imbalance_and_compression(tmp_path):
    study = REPRODUCTIONS["responsibility-imbalance"]
    outcomes, _ = ran(study, ["Gaussian (DCGAN)", "responsibility GAN"], tmp_path / "i")
    metrics = outcomes["responsibility GAN"][0].metrics
    assert sum(metrics[f"digit_{digit}"] for digit in range(10)) == pytest.approx(1)
    assert metrics["missing_digits"] in range(11)
    study = REPRODUCTIONS["responsibility-compression"]
    outcomes, _ = ran(study, ["DCGAN, width 4", "responsibility GAN, width 8"], tmp_path / "c")
    sizes = [found[0].metrics["parameters"] for found in outcomes.values()]
    assert sizes[0] < sizes[1]
    assert any("parameters" in figure.title for figure in study.figures(outcomes))


def test_digits_below_a_fifth_of_their_due_are_missing():
    due = np.array([900, 50, 50])
    assert missing_digits(np.array([98, 1, 1]), due) == 0
    assert missing_digits(np.array([995, 1, 4]), due) == 2
    assert missing_digits(np.array([100, 0, 20]), due) == 1


def test_details_are_judged_beside_the_mixture_s_own_samples(tmp_path, monkeypatch):
    study = REPRODUCTIONS["mfa-pix2pix"]
    monkeypatch.setattr(type(study), "prerequisites", (study.prerequisites[0], Member("mfa", "mnist", SMALL_MFA)))
    member = replace(study.members[0], overrides=(*study.members[0].overrides, "model.critic.stages=1"))
    monkeypatch.setattr(type(study), "members", (member,))
    outcomes, _ = ran(study, [member.label], tmp_path)
    found = outcomes[member.label][0]
    assert {"sharpness", "plain_sharpness", "real_sharpness", "ndb", "plain_ndb"} <= found.metrics.keys()
    gaps = [abs(found.metrics["real_sharpness"] - found.metrics[key]) for key in ("sharpness", "plain_sharpness")]
    assert found.metrics["gap_closed"] == pytest.approx(1 - gaps[0] / gaps[1])
    assert found.drawn["samples with details"].shape == (12, 8, 8, 1)
    assert len(study.figures(outcomes)) == 2
    assert found.metrics["plain_ndb"] == found.metrics["start/plain_ndb"]  # the mixture stands still
    assert found.metrics["sharpness"] != found.metrics["start/sharpness"]
