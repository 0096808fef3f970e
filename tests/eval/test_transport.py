"""Sliced Wasserstein and Sinkhorn against POT and closed forms."""

import json

import numpy as np
import pytest
import torch

from eval.metrics.transport import sinkhorn_divergence, sliced_wasserstein


def directions(projections, d, seed):
    theta = np.random.default_rng(seed).standard_normal((projections, d))
    return (theta / np.linalg.norm(theta, axis=1, keepdims=True)).T


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("m", [60, 84, 97])
def test_sliced_distance_equals_pot_for_equal_and_unequal_sets(p, m):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.gamma(2.0, size=(m, 5))
    theirs = ot.sliced_wasserstein_distance(x, y, projections=directions(40, 5, 3), p=p)
    assert sliced_wasserstein(x, y, p=p, projections=40, seed=3).value == pytest.approx(theirs, rel=1e-9)


def test_real_images_score_as_with_pot(digits, compare):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    x, y = digits.reference[:300], digits.samples[:200]
    theirs = ot.sliced_wasserstein_distance(x, y, projections=directions(100, 784, 0), p=2)
    compare("sliced W2 of MNIST pixels", sliced_wasserstein(x, y, projections=100).value, theirs)
    ours = sinkhorn_divergence(x, y, regularisation=0.2, tolerance=1e-5)
    theirs = ot.bregman.empirical_sinkhorn_divergence(x, y, ours.regularisation, method="sinkhorn_log", stopThr=1e-8)
    compare("Sinkhorn divergence of MNIST pixels (plan cost)", ours.plan_cost, theirs)


def test_sliced_distance_of_one_dimension_is_the_gap_of_quantiles():
    x = np.arange(4.0)[:, None]
    assert sliced_wasserstein(x + 1e6, x + 1e6 + 3).value == pytest.approx(3, rel=1e-9)
    assert sliced_wasserstein(x, np.repeat(x, 3, axis=0)).value == 0
    assert sliced_wasserstein(x, x[:2], p=1).value == pytest.approx(1)
    assert sliced_wasserstein(np.ones((2, 3)), np.ones((3, 3))).standard_error == 0


def test_standard_error_is_the_spread_over_seeds():
    """200 seeds: the spread is known to 5 %, so 20 % off has odds of 1e-4."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(40, 6)) * [1, 1, 3, 1, 1, 0.1]
    results = [sliced_wasserstein(x, y, projections=100, seed=seed) for seed in range(200)]
    assert np.mean([r.standard_error for r in results]) == pytest.approx(np.std([r.value for r in results]), rel=0.2)


@pytest.mark.parametrize(("dtype", "tolerance", "rel"), [(torch.float32, 2e-5, 1e-4), (torch.float64, 1e-7, 1e-6)])
@pytest.mark.parametrize("regularisation", [0.05, 0.5])
def test_sinkhorn_equals_pot(dtype, tolerance, rel, regularisation):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 3)), rng.normal(0.7, 1, size=(45, 3))
    ours = sinkhorn_divergence(x, y, regularisation=regularisation, tolerance=tolerance, dtype=dtype)
    assert ours.converged
    assert ours.mean_cost == pytest.approx(ot.dist(x, y).mean(), rel=1e-9)

    def both(a, b):
        cost, weights = ot.dist(a, b), (np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b)))
        plan = ot.sinkhorn(*weights, cost, ours.regularisation, method="sinkhorn_log", numItermax=10_000, stopThr=1e-10)
        density = plan * len(a) * len(b)
        entropy = ours.regularisation * (plan * np.log(np.where(density > 0, density, 1))).sum()
        return np.array([(plan * cost).sum() + entropy, (plan * cost).sum()])

    value, plan_cost = both(x, y) - both(x, x) / 2 - both(y, y) / 2
    assert ours.value == pytest.approx(value, rel=rel)
    assert ours.plan_cost == pytest.approx(plan_cost, rel=rel)


def test_sinkhorn_of_a_shifted_set_is_the_squared_shift():
    """For squared costs a shift leaves the optimal plan alone (Feydy et al., section 1), at any regularisation."""
    x = np.random.default_rng(3).normal(size=(200, 10))
    shift = np.linspace(-1, 1, 10)
    for offset in (0.0, 1e6):
        result = sinkhorn_divergence(x + offset, x + offset + shift, tolerance=1e-6, dtype=torch.float64)
        assert result.value == pytest.approx(shift @ shift, rel=1e-5)
    assert sinkhorn_divergence(x, x).value == pytest.approx(0, abs=1e-4)
    assert sinkhorn_divergence(x * 1e15, (x + shift) * 1e15).value == pytest.approx(shift @ shift * 1e30, rel=1e-3)


def test_sinkhorn_at_the_edges():
    two = np.array([[0.0], [1.0]])
    constant = np.full((5, 3), 1e6)
    assert sinkhorn_divergence(constant, constant).value == 0
    assert sinkhorn_divergence(constant, constant + 2).value == pytest.approx(12, rel=1e-6)
    assert sinkhorn_divergence(two, two + 5).value == pytest.approx(25, rel=1e-4)
    outlier = np.concatenate([np.random.default_rng(4).normal(size=(50, 2)), [[1e4, 0]]])
    result = sinkhorn_divergence(outlier, outlier[::-1] + np.array([3, 0]), dtype=torch.float64)
    assert result.value == pytest.approx(9, rel=0.05)
    stopped = sinkhorn_divergence(outlier, outlier[:20] + 3, max_iterations=1, tolerance=1e-12)
    assert (stopped.iterations, stopped.converged) == (1, False)
    json.dumps(stopped.to_dict(), allow_nan=False)


def test_unusable_arguments_are_refused():
    x = np.zeros((3, 2))
    for call, words in [
        (lambda: sliced_wasserstein(x, x, p=0.5), "at least 1"),
        (lambda: sliced_wasserstein(x, x, projections=1), "2 projections"),
        (lambda: sliced_wasserstein(x, np.zeros((3, 1))), "one feature extractor"),
        (lambda: sinkhorn_divergence(x, x[:1]), "at least 2 samples"),
        (lambda: sinkhorn_divergence(x, x, regularisation=0), "positive"),
        (lambda: sinkhorn_divergence(x, x, dtype=torch.float16), "dtype"),
        (lambda: sinkhorn_divergence(np.zeros((20_001, 1)), x[:, :1]), "subsamples"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
