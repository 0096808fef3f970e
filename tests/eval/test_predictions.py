"""Inception and MODE score against torchmetrics and plain sums, and what the splits depend on."""

import numpy as np
import pytest
import torch
from scipy import stats

from eval.metrics.predictions import Predictions


def predicted(p, splits=10, ids=None):
    result = Predictions(p.shape[1], splits)
    result.update(p, np.arange(len(p)) if ids is None else ids)
    return result


@pytest.fixture(scope="module")
def logits(digits):
    """A classifier by distance to the class means."""
    means = np.stack([digits.reference[digits.labels == k].mean(0) for k in range(10)])
    return -np.square(digits.samples[:, None] - means).sum(-1) / 5


def softmax(x):
    return torch.softmax(torch.from_numpy(x), 1).numpy()


def test_inception_score_of_real_images_equals_torchmetrics(logits, compare):
    image = pytest.importorskip("torchmetrics.image.inception", reason="torchmetrics is not installed")

    def established(x):
        metric = image.InceptionScore(feature=torch.nn.Identity(), splits=1)
        metric.update(torch.from_numpy(x))
        return float(metric.compute()[0])

    p = softmax(logits)
    compare("Inception score of MNIST", predicted(p, splits=1).inception_score().mean, established(logits))
    # Each split on its own, found by feeding its samples alone.
    owner = np.array([np.flatnonzero(predicted(p[i : i + 1], ids=np.array([i])).counts)[0] for i in range(1000)])
    parts = [established(logits[owner == k]) for k in range(10)]
    result = predicted(p).inception_score()
    compare("its mean over 10 splits", result.mean, np.mean(parts))
    assert result.standard_deviation == pytest.approx(np.std(parts), rel=1e-4)


def test_splits_depend_on_the_sample_alone_and_are_even():
    """10,000 numbers in 10 splits, each within 5 deviations (odds of 6e-6 if numbers were random)."""
    p = np.random.default_rng(0).dirichlet(np.ones(3), 10_000)
    ids = np.arange(10_000, dtype=np.uint64) + np.uint64(2**63)
    forward, order = predicted(p, ids=ids), np.random.default_rng(1).permutation(10_000)
    shuffled = predicted(p[order], ids=ids[order])
    assert np.array_equal(forward.counts, shuffled.counts)
    assert np.abs(forward.counts - 1000).max() < 5 * np.sqrt(900)
    assert shuffled.inception_score().mean == pytest.approx(forward.inception_score().mean, rel=1e-12)


def test_mode_score_is_equation_6_1():
    rng = np.random.default_rng(2)
    p, reference = rng.dirichlet(np.full(5, 0.3), 400), np.array([10, 20, 30, 25, 15])
    star, marginal = reference / 100, p.mean(0)
    sharpness = np.mean([stats.entropy(row, star) for row in p])
    result = predicted(p)
    assert result.mode_score(reference) == pytest.approx(np.exp(sharpness - stats.entropy(star, marginal)), rel=1e-9)
    assert result.reference_divergence(reference) == pytest.approx(stats.entropy(star, marginal), rel=1e-9)
    assert result.mean_entropy() == pytest.approx(np.mean([stats.entropy(row) for row in p]), rel=1e-9)
    # The other way round, the reference would cancel.
    assert np.exp(sharpness - stats.entropy(marginal, star)) == pytest.approx(
        predicted(p, splits=1).inception_score().mean
    )


def test_perfect_collapsed_and_blurred_samples():
    uniform = np.ones(4)
    perfect = predicted(np.eye(4)[np.arange(400) % 4], splits=1)
    assert perfect.inception_score().mean == pytest.approx(4)
    assert perfect.mode_score(uniform) == pytest.approx(4)
    collapsed = predicted(np.eye(4)[np.arange(400) % 3], splits=1)
    assert collapsed.classes_reached() == 3
    assert collapsed.reference_divergence(uniform) == np.inf
    assert collapsed.mode_score(uniform) == 0
    blurred = predicted(np.full((400, 4), 0.25), splits=1)
    assert blurred.inception_score().mean == pytest.approx(1)
    assert blurred.mean_entropy() == pytest.approx(np.log(4))


@pytest.mark.parametrize(
    ("p", "ids", "words"),
    [
        (np.array([[1.0, 2.0]]), [0], "softmax"),
        (np.array([[-0.5, 1.5]]), [0], "softmax"),
        (np.array([[np.nan, 1.0]]), [0], "finite"),
        (np.array([[0.5, 0.25, 0.25]]), [0], "2 classes"),
        (np.array([[0.5, 0.5]]), [0, 1], "per sample"),
        (np.array([[0.5, 0.5]]), [-1], "not negative"),
        (np.array([[0.5, 0.5]]), [0.5], "whole"),
    ],
)
def test_unusable_predictions_are_refused(p, ids, words):
    with pytest.raises(ValueError, match=words):
        Predictions(2).update(p, np.asarray(ids))


def test_splits_are_joined_where_they_would_be_small():
    """1,000 numbers in 10 splits, 260 in 5 or 2, 30 in 1; one of the joined is that of its samples alone."""
    p = np.random.default_rng(4).dirichlet(np.ones(4), 1000)
    assert predicted(p).inception_score().splits == 10
    few = predicted(p[:260])
    found = few.inception_score()
    assert found.splits in (2, 5)
    assert few.counts.reshape(found.splits, -1).sum(1).min() >= 50
    assert predicted(p[:30]).inception_score().mean == pytest.approx(predicted(p[:30], 1).inception_score().mean)


def test_too_few_samples_and_unusable_references_are_refused():
    few = predicted(np.full((3, 2), 0.5))
    assert few.inception_score().splits == 1
    with pytest.raises(ValueError, match="every class"):
        few.mode_score(np.array([1, 0]))
    with pytest.raises(ValueError, match="2 classes"):
        few.mode_score(np.ones(3))
    with pytest.raises(ValueError, match="at least 2 samples"):
        predicted(np.full((1, 2), 0.5)).mean_entropy()
