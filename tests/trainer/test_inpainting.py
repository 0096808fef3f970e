"""Posteriors, reconstructions and in-painting against dense Gaussian conditionals in float64."""

import numpy as np
import pytest
import torch
from mixtures import random_mfa
from scipy.stats import multivariate_normal

from trainer.models.inpainting import condition, inpaint


def dense(model, k):
    a = model.factor_loadings[k].detach().numpy()
    return model.means[k].detach().numpy(), a @ a.T + np.diag(model.noise_variance[k].detach().numpy()), a


def dense_condition(model, x, seen):
    """Per component: log π_k p(x_seen | k), the conditional mean of all features, and that of the factors."""
    log_joint, means, factors = [], [], []
    for k in range(model.n_components):
        mean, covariance, a = dense(model, k)
        gain = np.linalg.solve(covariance[np.ix_(seen, seen)], x[seen] - mean[seen]) if seen.any() else np.zeros(0)
        density = multivariate_normal.logpdf(x[seen], mean[seen], covariance[np.ix_(seen, seen)]) if seen.any() else 0
        log_joint.append(density + np.log(model.mixing_coefficients[k].item()))
        # Noise is independent, so hidden features depend on the observed ones through the factors alone.
        factors.append(a[seen].T @ gain)
        means.append(mean + a @ factors[-1])
    return np.array(log_joint), np.array(means), np.array(factors)


@pytest.mark.parametrize("shape", [(1, 5, 2), (3, 6, 0), (2, 3, 5), (4, 8, 3)])
def test_conditionals_equal_dense_ones(shape):
    """Every sample has its own observed set; all and none are among them."""
    model = random_mfa(*shape)
    x = model.sample(12, torch.Generator().manual_seed(1))
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    observed[0], observed[1] = True, False
    found = condition(model, torch.where(observed, x, torch.nan), observed)
    best, exact = (inpaint(model, torch.where(observed, x, torch.nan), observed, mode=m) for m in ("map", "mean"))
    for i in range(len(x)):
        seen = observed[i].numpy()
        log_joint, means, factors = dense_condition(model, x[i].numpy(), seen)
        assert np.allclose(found.log_joint[i], log_joint)
        assert np.allclose(found.mean[i], factors)
        weights = np.exp(log_joint - np.logaddexp.reduce(log_joint))
        assert np.allclose(best[i].numpy()[~seen], means[log_joint.argmax()][~seen])
        assert np.allclose(exact[i].numpy()[~seen], (weights @ means)[~seen])
        assert np.array_equal(best[i].numpy()[seen], x[i].numpy()[seen])


def test_drawn_completions_have_the_conditional_moments():
    """20,000 draws with noise; mean and covariance of hidden features within 5 standard errors (odds below 1e-4)."""
    model = random_mfa(1, 5, 2)
    mean, covariance, _ = dense(model, 0)
    x = model.sample(1, torch.Generator().manual_seed(1))
    seen = np.array([True, False, True, False, False])
    gain = covariance[np.ix_(~seen, seen)] @ np.linalg.inv(covariance[np.ix_(seen, seen)])
    expected = mean[~seen] + gain @ (x[0].numpy()[seen] - mean[seen])
    spread = covariance[np.ix_(~seen, ~seen)] - gain @ covariance[np.ix_(seen, ~seen)]
    n = 20_000
    draws = inpaint(
        model,
        x.repeat(n, 1),
        torch.from_numpy(seen),
        mode="sample",
        noise=True,
        generator=torch.Generator().manual_seed(0),
    )
    hidden = draws.numpy()[:, ~seen]
    assert (np.abs(hidden.mean(0) - expected) < 5 * np.sqrt(np.diag(spread) / n)).all()
    products = (hidden - expected)[:, :, None] * (hidden - expected)[:, None, :]
    assert (np.abs(products.mean(0) - spread) < 5 * products.std(0) / n**0.5).all()


def test_draws_choose_components_by_their_responsibilities():
    """Nothing observed: components come up by their mixing coefficients, within 5 standard errors."""
    model = random_mfa(3, 2, 1, noise=1e-4)
    with torch.no_grad():
        model.means.copy_(torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]]))
    n = 5000
    x = inpaint(model, torch.zeros(n, 2), torch.zeros(2, dtype=bool), mode="sample", generator=torch.manual_seed(0))
    shares = torch.bincount(model.map_component(x), minlength=3) / n
    π = model.mixing_coefficients.detach()
    assert ((shares - π).abs() < 5 * (π * (1 - π) / n).sqrt()).all()


@pytest.mark.parametrize("shape", [(2, 6, 2), (1, 1, 1), (3, 4, 0)])
def test_latent_posterior_and_reconstruction_equal_dense_ones(shape):
    model = random_mfa(*shape)
    x = model.sample(10, torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean, covariance = model.latent_posterior(x)
        rebuilt, component = model.reconstruct(x), model.map_component(x)
    for i in range(len(x)):
        mu, sigma, a = dense(model, int(component[i]))
        z = a.T @ np.linalg.solve(sigma, x[i].numpy() - mu)
        assert np.allclose(mean[i], z)
        assert np.allclose(covariance[i], np.eye(shape[2]) - a.T @ np.linalg.solve(sigma, a))
        assert np.allclose(rebuilt[i], mu + a @ z)


def test_inpainting_in_chunks_is_the_same(monkeypatch):
    model = random_mfa(5, 7, 2)
    x = model.sample(9, torch.Generator().manual_seed(1))
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    whole = inpaint(model, x, observed)
    monkeypatch.setattr("trainer.models.inpainting._CHUNK_BYTES", 600)
    assert torch.allclose(inpaint(model, x, observed), whole)


def test_shapes_that_do_not_fit_are_refused():
    model = random_mfa(2, 4, 1)
    with pytest.raises(ValueError, match="observed has the shape"):
        inpaint(model, torch.zeros(3, 4), torch.ones(5, dtype=bool))
    with pytest.raises(ValueError, match="boolean"):
        inpaint(model, torch.zeros(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="features"):
        inpaint(model, torch.zeros(3, 5), torch.ones(3, 5, dtype=bool))


def test_a_common_offset_costs_no_digits():
    """Data and means a hundred thousand away from zero, noise of 1e-4."""
    model = random_mfa(2, 20, 2, noise=1e-4)
    x = model.sample(5, torch.Generator().manual_seed(1))
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    near = condition(model, x, observed).log_joint
    with torch.no_grad():
        model.means.add_(1e5)
    far = condition(model, x + 1e5, observed).log_joint
    assert torch.allclose(near, far, atol=1e-2, rtol=1e-6)
