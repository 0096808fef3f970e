"""Moments and the Fréchet distance against torchmetrics, closed forms, and at the edges."""

import numpy as np
import pytest
import torch

from eval.metrics.moments import Moments, frechet_distance, frechet_standard_error


def moments(*parts):
    result = Moments(parts[0].shape[1])
    for part in parts:
        result.update(part)
    return result


class AsIs(torch.nn.Module):
    """A feature extractor for torchmetrics that passes features through."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


def test_fid_of_real_images_equals_torchmetrics(digits, compare):
    image = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    metric = image.FrechetInceptionDistance(feature=AsIs(784)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(digits.reference), real=True)
    metric.update(torch.from_numpy(digits.samples), real=False)
    a, b = moments(digits.reference), moments(digits.samples)
    compare("FID of MNIST pixels", frechet_distance(a, b), metric.compute())
    assert np.isfinite(frechet_standard_error(a, b, digits.reference, digits.samples))


def test_fid_is_the_closed_form_in_one_dimension_and_for_independent_features():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 1)), 3 + 2 * rng.normal(size=(60, 1))
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-12)
    a, b = Moments(3), Moments(3)
    a.n, a.scatter, a.mean = 11, 10 * np.diag([1.0, 4.0, 0.0]), np.array([0.0, 1.0, 0.0])
    b.n, b.scatter = 21, 20 * np.diag([9.0, 4.0, 0.25])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 0 + 0.25, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(2, 3), (30, 200), (500, 40)])
def test_singular_covariances_lose_no_digits(n, d):
    """The trace of (S_a S_b)^½ is the nuclear norm of the product of the centred data, whatever n and d."""
    rng = np.random.default_rng(1)
    scales = 10.0 ** rng.uniform(-4, 4, d)
    x, y = rng.normal(size=(n, d)) * scales, (rng.normal(size=(n + 1, d)) + 0.5) * scales
    x[:, 0] = y[:, 0] = 7
    u, v = (x - x.mean(0)) / np.sqrt(n - 1), (y - y.mean(0)) / np.sqrt(n)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.square(u).sum() + np.square(v).sum()
    expected -= 2 * np.linalg.svd(u @ v.T, compute_uv=False).sum()
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-6)
    spread = np.trace(moments(x).covariance())
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-7 * spread)


def test_a_large_offset_costs_no_digits():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(9000, 8)), rng.normal(size=(500, 8)) * 1.1
    plain = frechet_distance(moments(x), moments(y))
    shifted = frechet_distance(moments(x + 1e6), moments(*np.split(y + 1e6, 10)))
    assert shifted == pytest.approx(plain, rel=1e-6)
    assert np.allclose(moments(x + 1e6).covariance(), np.cov(x.T), rtol=1e-7, atol=1e-9)


def test_standard_error_is_the_spread_of_repeated_draws():
    """200 pairs of sets: the spread is known to 5 %, so 20 % off has odds of 1e-4 at most; seeds are fixed."""
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(4, 4))
    values, errors = [], []
    for _ in range(200):
        x, y = rng.standard_t(10, size=(800, 4)) @ mixing, rng.normal(size=(400, 4)) * [1, 2, 0.5, 1] + 0.4
        a, b = moments(x), moments(y)
        values.append(frechet_distance(a, b))
        errors.append(frechet_standard_error(a, b, x[:300], y[:300]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


@pytest.mark.parametrize("features", [np.zeros((5, 3)), np.tile([1e6, -3.0, 0.1], (5, 1)), np.eye(2)])
def test_constant_and_few_features_have_a_distance_and_an_error(features):
    a = moments(features)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_standard_error(a, a, features, features) == pytest.approx(0, abs=1e-6)


def test_unusable_arguments_are_refused():
    with pytest.raises(ValueError, match="feature extractor"):
        Moments(9000)
    with pytest.raises(ValueError, match="finite"):
        Moments(2).update(np.array([[0, np.nan]]))
    with pytest.raises(ValueError, match="3 per sample"):
        Moments(3).update(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(moments(np.zeros((1, 2))), moments(np.zeros((3, 2))))
    with pytest.raises(ValueError, match="one feature extractor"):
        frechet_distance(moments(np.zeros((3, 2))), moments(np.zeros((3, 3))))
