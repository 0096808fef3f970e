"""Log-likelihood summaries and the Gaussian baselines against closed forms and SciPy."""

import numpy as np
import pytest
from scipy import stats

from data.errors import UserError
from eval.baselines import fit_gaussian_mixture
from eval.likelihood import summarise


def test_mean_and_standard_error():
    summary = summarise(np.array([-1.0, -2.0, -3.0, -6.0], np.float32))
    assert summary.mean == -3.0
    assert summary.standard_error == pytest.approx(np.std([-1, -2, -3, -6], ddof=1) / 2)
    assert summary.n == 4
    assert summary.bits_per_dimension is None
    assert str(summary) == "-3.00 ± 1.08"


def test_bits_per_dimension_of_known_densities():
    """Uniform pixels carry log2(levels) bits; a density of 2 on half of [0, 1] carries one bit less."""
    assert summarise(np.zeros(5), n_dimensions=3).bits_per_dimension == pytest.approx(8)
    assert summarise(np.full(5, 3 * np.log(2)), n_dimensions=3).bits_per_dimension == pytest.approx(7)
    assert summarise(np.zeros(5), n_dimensions=3, levels=32).bits_per_dimension == pytest.approx(5)


def test_expected_log_likelihood_of_a_gaussian():
    """E log N(x) = -d/2 (1 + ln 2 pi); 5 standard errors have odds of 6e-7."""
    x = np.random.default_rng(0).standard_normal((20_000, 3))
    summary = summarise(stats.multivariate_normal(np.zeros(3)).logpdf(x))
    assert abs(summary.mean + 1.5 * (1 + np.log(2 * np.pi))) < 5 * summary.standard_error


@pytest.mark.parametrize(("values", "words"), [([1.0], "at least 2"), ([1.0, np.nan, -np.inf], "2 of 3")])
def test_unusable_log_likelihoods_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        summarise(np.array(values))


def test_single_gaussian_equals_scipy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 5)) @ rng.standard_normal((5, 5)) + 3
    model = fit_gaussian_mixture(x, 1, seed=0)
    expected = stats.multivariate_normal(x.mean(axis=0), np.cov(x.T, bias=True) + 1e-6 * np.eye(5))
    np.testing.assert_allclose(model.log_prob(x[:50]), expected.logpdf(x[:50]), rtol=1e-9)
    drawn = model.sample(100_000, seed=1)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(x.T), atol=0.03 * np.abs(np.cov(x.T)).max())
    assert np.array_equal(drawn, model.sample(100_000, seed=1))


def test_mixture_density_and_samples():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-4, 1, (3000, 2)), rng.normal(4, 0.5, (1000, 2))])
    model = fit_gaussian_mixture(x, 2, seed=0)
    parts = [(0.75, x[:3000]), (0.25, x[3000:])]
    density = sum(w * stats.multivariate_normal(p.mean(axis=0), np.cov(p.T)).pdf(x[::100]) for w, p in parts)
    np.testing.assert_allclose(model.log_prob(x[::100]), np.log(density), rtol=2e-3)
    drawn = model.sample(4000, seed=2)
    assert abs(np.mean(drawn[:, 0] < 0) - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)
    assert 0.6 < np.mean(drawn[:100, 0] < 0) < 0.9  # in random order, not sorted by component


def test_baseline_refuses_bad_input():
    with pytest.raises(UserError, match="too few"):
        fit_gaussian_mixture(np.zeros((3, 2)), 5, seed=0)
    with pytest.raises(UserError, match="flatten"):
        fit_gaussian_mixture(np.zeros((3, 2, 2)), 1, seed=0)
    with pytest.raises(UserError, match="NaN"):
        fit_gaussian_mixture(np.full((3, 2), np.nan), 1, seed=0)
