"""Precision, recall, density, coverage and memorisation against prdc, SciPy and all pairs, ties included."""

import json

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from eval.metrics import manifold
from eval.metrics.manifold import compare_distances, manifold_scores, nearest_neighbours

NAMES = ("precision", "recall", "density", "coverage")


def all_pairs(x, y, k):
    """The four scores straight from their definitions, with closed balls."""
    across = cdist(x, y, "sqeuclidean")
    own_x, own_y = (np.sort(cdist(z, z, "sqeuclidean") + np.diag(np.full(len(z), np.inf)))[:, k - 1] for z in (x, y))
    in_x, in_y = across <= own_x[:, None], across <= own_y
    return in_x.any(0).mean(), in_y.any(1).mean(), in_x.sum(0).mean() / k, in_x.any(1).mean()


def test_real_images_score_as_with_prdc(digits, compare):
    prdc = pytest.importorskip("prdc", reason="prdc is not installed")
    theirs = prdc.compute_prdc(digits.reference, digits.samples, 5)
    theirs |= {name: prdc.compute_prdc(digits.reference, digits.samples, 3)[name] for name in ("precision", "recall")}
    ours = manifold_scores(digits.reference.astype(np.float32), digits.samples.astype(np.float32))
    for name in NAMES:
        compare(f"{name} of MNIST pixels", getattr(ours, name), theirs[name])
    assert ours.precision_standard_error == pytest.approx(np.sqrt(ours.precision * (1 - ours.precision) / 1000))
    json.dumps(ours.to_dict(), allow_nan=False)


def grid(rng):
    return rng.integers(0, 4, (300, 3)).astype(float), rng.integers(0, 5, (200, 3)).astype(float)


def duplicates(rng):
    x = np.repeat(rng.normal(size=(40, 6)), 6, axis=0)
    return x, np.concatenate([x[:90], rng.normal(size=(60, 6))])


def outliers(rng):
    x, y = rng.normal(size=(300, 10)), rng.normal(size=(300, 10))
    x[0], y[0] = 1e7, -1e5
    return x, y


def offset(rng):
    # Halves are exact beside the offset, so that the plain computation is too.
    return 1e6 + rng.integers(0, 50, (300, 4)) / 2, 1e6 + rng.integers(0, 50, (200, 4)) / 2


def one_dimension(rng):
    return rng.normal(size=(400, 1)), rng.normal(size=(300, 1)) * 3


def nearly_equal(rng):
    return 1 + rng.normal(size=(200, 30)) * 1e-5, 1 + rng.normal(size=(200, 30)) * 1e-5


def constant(rng):
    return np.full((20, 3), 1e6), np.full((30, 3), 1e6)


@pytest.mark.parametrize("case", [grid, duplicates, outliers, offset, one_dimension, nearly_equal, constant])
@pytest.mark.parametrize("k", [1, 4])
def test_ties_and_extreme_features_are_exact(case, k, monkeypatch):
    monkeypatch.setattr(manifold, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(manifold, "_BLOCK_COLUMNS", 50)
    monkeypatch.setattr(manifold, "_EXACT_VALUES", 100)
    x, y = case(np.random.default_rng(0))
    ours = manifold_scores(x, y, neighbours=k, density_neighbours=k)
    assert [getattr(ours, name) for name in NAMES] == pytest.approx(all_pairs(x, y, k), abs=1e-12)
    squared, indices = nearest_neighbours(x, y, k)
    across = cdist(x, y, "sqeuclidean")
    assert squared == pytest.approx(np.sort(across)[:, :k], rel=1e-12, abs=1e-12)
    assert np.take_along_axis(across, indices, 1) == pytest.approx(squared, rel=1e-12, abs=1e-12)


def test_single_precision_changes_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(1500, 40)) @ rng.normal(size=(40, 100)) for _ in range(2))
    fast = manifold_scores(x, y), nearest_neighbours(x, y, 7)
    monkeypatch.setattr(manifold, "_FLOAT32_FEATURES", 1)
    slow = manifold_scores(x, y), nearest_neighbours(x, y, 7)
    assert fast[0] == slow[0]
    assert np.array_equal(fast[1][0], slow[1][0])
    assert np.array_equal(fast[1][1], slow[1][1])


def memorisation(training, samples, held_out):
    (own, nearest), (other, _) = (nearest_neighbours(x, training, 1) for x in (samples, held_out))
    return compare_distances(np.sqrt(own[:, 0]), np.sqrt(other[:, 0]), nearest[:, 0])


def test_copies_of_the_training_samples_are_found():
    rng = np.random.default_rng(2)
    training, held_out = rng.normal(size=(500, 8)), rng.normal(size=(300, 8))
    samples = rng.normal(size=(400, 8))
    samples[:40] = training[100:140] + 1e-6
    result = memorisation(training, samples, held_out)
    assert {tuple(pair) for pair in result.closest(40)} == {(i, 100 + i) for i in range(40)}
    assert np.all(np.diff(result.distances[result.closest(60)[:, 0]]) >= 0)
    assert result.shares[0] > 0.1
    assert result.held_out_shares == (0.01, 0.05)
    test = stats.mannwhitneyu(result.distances, result.held_out_distances, method="asymptotic", use_continuity=False)
    assert 2 * stats.norm.sf(abs(result.z)) == pytest.approx(test.pvalue, rel=1e-9)
    copies = memorisation(training, training[:50], held_out)
    assert copies.shares == (1, 1)
    assert copies.z < -8
    json.dumps(copies.to_dict(), allow_nan=False)


def test_mann_whitney_z_corrects_for_ties_as_scipy_does():
    rng = np.random.default_rng(3)
    training = np.zeros((2, 1))
    samples, held_out = rng.integers(0, 5, (80, 1)), rng.integers(0, 6, (70, 1))
    z = memorisation(training, samples, held_out).z
    test = stats.mannwhitneyu(samples[:, 0], held_out[:, 0], method="asymptotic", use_continuity=False)
    assert z < 0
    assert 2 * stats.norm.sf(-z) == pytest.approx(test.pvalue, rel=1e-9)
    assert memorisation(training, training, training).z == 0


def test_samples_that_copy_nothing_raise_no_alarm():
    """100 draws: |z| > 4 has odds of 6e-5 each; the share below the 5 % quantile averages 5 % within 4 errors."""
    rng = np.random.default_rng(4)
    results = [memorisation(*(rng.normal(size=(100, 4)) for _ in range(3))) for _ in range(100)]
    assert max(abs(r.z) for r in results) < 4
    shares = np.array([r.shares[1] for r in results])
    assert abs(shares.mean() - 0.05) < 4 * shares.std() / 10
    # 100 shares: their spread is known to 7 %, so 30 % off has odds of 2e-5; half of it is the held-out quantile's.
    assert np.mean([r.shares_standard_errors[1] for r in results]) == pytest.approx(shares.std(), rel=0.3)


def test_unusable_arguments_are_refused():
    x = np.random.default_rng(5).normal(size=(5, 2))
    with pytest.raises(ValueError, match="fewer neighbours"):
        manifold_scores(x, x)
    with pytest.raises(ValueError, match="2 features, samples 3"):
        manifold_scores(x, np.zeros((5, 3)), neighbours=1, density_neighbours=1)
    with pytest.raises(ValueError, match="at least 2 samples"):
        manifold_scores(x, x[:1], neighbours=1, density_neighbours=1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        compare_distances(x[:, 0], x[:, 0], np.arange(5), [5])
    with pytest.raises(ValueError, match="k up to 4"):
        nearest_neighbours(x, x, 5, same=True)
