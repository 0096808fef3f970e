"""The contract that every model keeps, and the MFA's numbers against dense float64 references."""

import math

import numpy as np
import pytest
import torch
from mixtures import random_mfa
from scipy.stats import multivariate_normal

from trainer.checkpoint import load_model, save_model
from trainer.initialise import initialise_mfa
from trainer.models.factor_analysis import fit_factor_analyser
from trainer.models.mfa import MFA
from trainer.settings import InitialisationSettings


def dense_log_prob(model, x):
    """Mixture of multivariate normals with dense covariances, float64, by SciPy."""
    model = model.double()
    parts = []
    for k in range(model.n_components):
        a = model.factor_loadings[k].detach().numpy()
        covariance = a @ a.T + np.diag(model.noise_variance[k].detach().numpy())
        log_density = multivariate_normal.logpdf(x, model.means[k].detach().numpy(), covariance)
        parts.append(np.atleast_1d(log_density) + math.log(model.mixing_coefficients[k].item()))
    return np.logaddexp.reduce(np.stack(parts), axis=0)


# (components, features, factors): one component, one feature, no factors, more factors than features
SHAPES = [(1, 5, 2), (4, 1, 1), (3, 6, 0), (2, 3, 5), (7, 20, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_equals_dense_mixture_in_float64(shape):
    model = random_mfa(*shape)
    x = model.sample(50, torch.Generator().manual_seed(1))
    assert torch.allclose(model.log_prob(x), torch.from_numpy(dense_log_prob(model, x.numpy())), rtol=1e-10, atol=0)


def test_log_prob_in_float32_at_image_size_and_small_noise():
    """784 dimensions, noise variance 1e-3: relative error below 1e-4."""
    model = random_mfa(5, 784, 6, noise=1e-3)
    x = model.sample(100, torch.Generator().manual_seed(1))
    exact = dense_log_prob(model, x.numpy())
    single = MFA(5, 784, 6)
    single.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    error = np.abs(single.log_prob(x.float()).detach().numpy() - exact) / np.abs(exact)
    assert error.max() < 1e-4
    responsibilities = single.responsibilities(x.float()).detach()
    assert torch.allclose(responsibilities.double(), model.responsibilities(x), atol=1e-3)


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-6])
def test_training_gradient_in_float32_equals_float64(noise):
    """`forward`, overlapping components, down to noise at which float32 products alone lose every digit."""
    model = random_mfa(3, 784, 3, noise=noise)
    with torch.no_grad():
        model.means.mul_(0.01)
    model = model.float()  # the same parameters in both precisions
    exact = MFA(3, 784, 3).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    x = model.sample(16, torch.Generator().manual_seed(1))
    model(x)[0].mean().backward()
    exact(x.double())[0].mean().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters()):
        assert (ours.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max()


def test_collinear_loadings_and_tiny_noise_do_not_break_the_factorisation():
    model = MFA(1, 784, 3, noise_floor=1e-9)
    direction = torch.rand(784, 1, generator=torch.Generator().manual_seed(0)) * 0.1
    loadings = direction * torch.tensor([1.0, 1 + 1e-6, 1 - 1e-6])
    model.set_components(torch.ones(1), torch.zeros(1, 784), loadings[None], torch.full((1, 784), 1e-6))
    assert torch.isfinite(model.log_prob(torch.rand(4, 784))).all()


def test_density_integrates_to_one():
    model = random_mfa(3, 1, 1)
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    assert torch.trapezoid(model.log_prob(x[:, None]).exp(), x).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_contract(shape, tmp_path, manifest_for):
    model = random_mfa(*shape, dtype=torch.float32)
    x = model.sample(9, torch.Generator().manual_seed(3))
    assert x.shape == (9, shape[1])
    assert torch.equal(x, model.sample(9, torch.Generator().manual_seed(3)))
    assert model.sample(9, noise=False).shape == (9, shape[1])
    responsibilities = model.responsibilities(x)
    assert responsibilities.shape == (9, shape[0])
    assert torch.allclose(responsibilities.sum(1), torch.ones(9))
    log_prob, log_prior = model(x.reshape(9, shape[1], 1))
    assert log_prob.shape == (9,)
    assert log_prior.shape == ()
    model.set_noise_prior(2.0, torch.ones(shape[1]))
    (-model(x)[0].mean() - model(x)[1]).backward()
    gradients = [p.grad for p in model.parameters() if p.numel()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert all(g.abs().sum() > 0 for g in gradients[1:])  # the first are the mixing logits: zero where K = 1
    save_model(str(tmp_path), model, "mfa", manifest_for((shape[1],)), dequantised=False)
    again, document = load_model(str(tmp_path))
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    assert document["data"]["shape"] == [shape[1]]
    assert f"n_components={shape[0]}" in repr(model)
    with pytest.raises(ValueError, match="features"):
        model.log_prob(torch.zeros(2, shape[1] + 1))


def test_samples_have_the_model_s_moments():
    """Mean and covariance of 200,000 samples within 5 standard errors: false alarm odds below 1e-4."""
    model = random_mfa(2, 3, 1)
    x = model.sample(200_000, torch.Generator().manual_seed(0)).numpy()
    π = model.mixing_coefficients.detach().numpy()
    means = model.means.detach().numpy()
    mean = π @ means
    loadings = model.factor_loadings.detach().numpy()
    noise = np.stack([np.diag(v) for v in model.noise_variance.detach().numpy()])
    within = loadings @ loadings.transpose(0, 2, 1) + noise
    covariance = np.einsum("k,kij->ij", π, within) + np.einsum("k,ki,kj->ij", π, means - mean, means - mean)
    error = np.sqrt(np.diag(covariance) / len(x))
    assert (np.abs(x.mean(0) - mean) < 5 * error).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert (np.abs(products.mean(0) - covariance) < 5 * products.std(0) / len(x) ** 0.5).all()


def test_an_outlier_and_a_vanished_component_stay_finite():
    model = random_mfa(3, 4, 2, dtype=torch.float32)
    with torch.no_grad():
        model.mixing_logits[1] = -200.0
    x = torch.full((2, 4), 1e6)
    assert torch.isfinite(model.log_prob(x)).all()
    assert torch.isfinite(model.responsibilities(x)).all()
    (-model(x)[0].mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_noise_prior_moves_the_optimum_to_the_map_estimate():
    """At D = (N S + ν v) / (N + ν) the gradient of the log-posterior vanishes (K = 1, no factors)."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior, count = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), 7.0
    model = MFA(1, 3, 0, noise_floor=1e-12).double()
    optimum = (40 * x.var(0, correction=0) + count * prior) / (40 + count)
    model.set_components(torch.ones(1), x.mean(0)[None], torch.zeros(1, 3, 0), optimum[None])
    model.set_noise_prior(count, prior)
    log_prob, log_prior = model(x)
    (log_prob.sum() + log_prior).backward()
    assert model.log_noise_variance.grad.abs().max() < 1e-9


def test_factor_analysis_reaches_scikit_learn():
    from sklearn.decomposition import FactorAnalysis

    model = random_mfa(1, 12, 3, noise=0.3)
    x = model.sample(600, torch.Generator().manual_seed(0))
    theirs = FactorAnalysis(3, tol=1e-9, max_iter=5000).fit(x.numpy()).score(x.numpy())
    fitted = fit_factor_analyser(x, 3, n_iterations=2000)
    ours = MFA(1, 12, 3).double()
    ours.set_components(torch.ones(1), *(part[None] for part in fitted))
    assert ours.log_prob(x).mean().item() == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.ones(1, 4), "one sample"),
        (torch.ones(6, 4), "duplicates"),
        (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "fewer samples than factors"),
        (torch.randn(9, 1, generator=torch.Generator().manual_seed(0)), "one feature"),
        (torch.cat([torch.zeros(20, 4), torch.full((1, 4), 1e6)]), "one far outlier"),
    ],
)
def test_factor_analysis_of_degenerate_clusters(x, what):
    fitted = fit_factor_analyser(x.double(), 5, noise_floor=1e-6)
    assert fitted.factor_loadings.shape == (x.shape[1], 5)
    assert all(torch.isfinite(part).all() for part in fitted), what
    assert (fitted.noise_variance >= 1e-6).all()


@pytest.mark.parametrize("count", [0.0, 10.0])
def test_initialisation_survives_empty_and_singleton_clusters(count):
    """Five distinct points, one of them far away, for eight components."""
    points = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [1e4, 1e4]], np.float32)
    x = np.repeat(points, [10, 10, 10, 10, 1], axis=0)
    model = MFA(8, 2, 1, noise_floor=1e-4)
    initialise_mfa(model, x, InitialisationSettings(noise_prior_count=count), seed=0)
    assert torch.isfinite(model.log_prob(torch.from_numpy(x))).all()
    assert model.mixing_coefficients.sum().item() == pytest.approx(1, abs=1e-6)


def test_initialisation_finds_separated_components():
    g = torch.Generator().manual_seed(0)
    truth = MFA(3, 5, 1).double()
    truth.set_components(
        torch.tensor([0.5, 0.3, 0.2]),
        torch.tensor([[0.0] * 5, [20.0] * 5, [-20.0] * 5]),
        torch.randn(3, 5, 1, generator=g),
        torch.full((3, 5), 0.1),
    )
    x = truth.sample(3000, g)
    model = MFA(3, 5, 1)
    initialise_mfa(model, x.float().numpy(), InitialisationSettings(), seed=0)
    # The truth is within sampling error of the best fit: 24 parameters over 3000 samples are worth about 0.004 nats.
    assert model.log_prob(x.float()).mean().item() > truth.log_prob(x).mean().item() - 0.02


def test_isotropic_noise_takes_the_mean_of_a_row():
    model = MFA(2, 3, 0, noise="isotropic")
    variance = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    model.set_components(torch.ones(2), torch.zeros(2, 3), torch.zeros(2, 3, 0), variance)
    assert torch.allclose(model.noise_variance, torch.tensor([[3.0] * 3, [4.0] * 3]))
    model.set_noise_prior(2.0, variance)
    assert torch.allclose(model.noise_prior_variance, torch.tensor([[3.0], [4.0]]))
    expected = -0.5 * 2 * sum(3 * (math.log(v) + 1) for v in (3, 4))
    assert model.log_prior().item() == pytest.approx(expected, rel=1e-6)


def test_the_best_of_several_starts_is_taken():
    """Four starts on overlapping clusters: as good as the best of them alone, which not all of them are."""
    x = random_mfa(8, 3, 1, noise=0.3).sample(400, torch.Generator().manual_seed(0)).float()

    def reached(seed, n_starts):
        model = MFA(8, 3, 1, 1e-4)
        initialise_mfa(model, x.numpy(), InitialisationSettings(n_init=1, n_starts=n_starts), seed=seed)
        return model.log_prob(x).mean().item()

    alone = [reached(7919 * start, 1) for start in range(4)]
    assert max(alone) > min(alone) + 1e-3
    assert reached(0, 4) == pytest.approx(max(alone), abs=1e-6)


def test_the_noise_prior_is_blurred_over_the_image():
    """One noisy column: with smoothing its variance reaches the columns beside it, and a little everywhere."""
    rng = np.random.default_rng(0)
    x = np.zeros((400, 9, 9), np.float32)
    x[:, :, 4] = rng.normal(0, 1, (400, 9))
    flat = x.reshape(400, 81)
    priors = []
    for smoothing in (0.0, 1.0):
        model = MFA(1, 81, 0, 1e-8)
        settings = InitialisationSettings(noise_prior_count=1, noise_prior_smoothing=smoothing)
        initialise_mfa(model, flat, settings, seed=0, shape=(9, 9))
        priors.append(model.noise_prior_variance.reshape(9, 9)[4])
    sharp, blurred = priors
    assert sharp[4] == pytest.approx(1, abs=0.3)
    assert sharp[3] < 1e-6
    assert 0.1 < blurred[3] < blurred[4] < 0.6
    assert blurred[0] > 1e-6


def test_random_starts_take_their_noise_prior_from_all_samples():
    """Features of variance 1 and 1e-6: the quiet one's prior is quiet."""
    rng = np.random.default_rng(0)
    x = (rng.normal(0, 1, (500, 2)) * [1, 1e-3]).astype(np.float32)
    model = MFA(2, 2, 0, 1e-9)
    initialise_mfa(model, x, InitialisationSettings(method="random", noise_prior_count=1), seed=0)
    assert model.noise_prior_variance[:, 1].max() < 1e-5
