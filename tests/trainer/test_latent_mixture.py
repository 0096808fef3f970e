"""Latent mixtures, with a classifier or without: the models' contract, posterior, draws and ways between Gaussians."""

import numpy as np
import pytest
import torch
from latent_mixtures import model_for

from deploy.served_model import tasks_of
from trainer.checkpoint import load_model, save_model
from trainer.models.latent_mixture import LatentMixture, LatentPrior, barycentric

SHAPES = [(28, 28), (8, 8, 2), (9, 40, 3), (3,)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_contract(shape, k, shared, tmp_path, manifest_for):
    torch.manual_seed(0)
    model = model_for(shape, k, shared=shared)
    model.set_scale(torch.rand(50, *shape) * 3 + 7)
    x = model.sample(6, torch.Generator().manual_seed(2))
    assert x.shape == (6, model.n_features)
    assert torch.equal(x, model.sample(6, torch.Generator().manual_seed(2)))
    responsibilities = model.responsibilities(x.reshape(6, *shape))
    assert responsibilities.shape == (6, k)
    assert torch.allclose(responsibilities.sum(1), torch.ones(6))
    assert tasks_of(model) == ["responsibilities", "sample", "decode"]
    _, log_prior, samples, components = model(None, 200)
    assert (log_prior.item(), samples.shape) == (0, (200, model.n_features))
    assert components.unique().tolist() == list(range(k))
    save_model(str(tmp_path), model, "responsibility", manifest_for(shape), dequantised=False)
    again, _ = load_model(str(tmp_path))
    assert torch.equal(again.responsibilities(x), responsibilities)
    assert torch.equal(
        again.sample(3, torch.Generator().manual_seed(5)), model.sample(3, torch.Generator().manual_seed(5))
    )
    with pytest.raises(ValueError, match="features"):
        model.responsibilities(torch.zeros(2, model.n_features + 1))


def test_a_registered_model_runs_from_its_own_files(tmp_path):
    from deploy.served_model import load_network
    from deploy.sources import write_sources

    for family, model in (("responsibility", model_for()), ("latent_mixture", LatentMixture((8, 8), 2, n_latent=3))):
        write_sources(family, tmp_path / family)
        twin = load_network(str(tmp_path / family), family)(**model.config)
        twin.load_state_dict(model.state_dict())
        z = torch.randn(2, model.n_latent)
        assert torch.equal(twin.decode(z), model.decode(z))


@pytest.mark.parametrize(("learns", "count"), [("learnt", 2), ("unit", 1), ("fixed", 0)])
def test_the_posterior_of_the_latent_mixture(learns, count):
    """Against SciPy, in float64."""
    from scipy.stats import multivariate_normal

    torch.manual_seed(0)
    prior = LatentPrior(3, 2, 1.0, learns).double()
    assert len(list(prior.parameters())) == count
    with torch.no_grad():
        prior.log_deviations.copy_(torch.randn(3, 2) * 0.3)
    noise = torch.randn(5, 3, 2, dtype=torch.float64)
    z, log_posterior = prior(noise, torch.arange(3).expand(5, 3))
    means, deviations = prior.means.detach().numpy(), prior.log_deviations.detach().exp().numpy()
    points = z.detach().numpy()
    np.testing.assert_allclose(points, means + deviations * noise.numpy())
    densities = np.stack([multivariate_normal(m, np.diag(s**2)).pdf(points) for m, s in zip(means, deviations)], -1)
    expected = densities / densities.sum(-1, keepdims=True)
    np.testing.assert_allclose(log_posterior.exp().detach().numpy(), expected, rtol=1e-9)


def test_samples_of_one_gaussian_and_ways_between_them():
    torch.manual_seed(0)
    model = LatentMixture((2,), 4, n_latent=3, n_hidden=5)
    noise = torch.randn(3)
    ends = model.decode(model.prior.place(noise.expand(4, 3), torch.arange(4)))
    path = model.interpolate(barycentric((2, 0), 4, 5), noise)
    assert path.shape == (5, 2)
    assert torch.allclose(path[[0, -1]], ends[[2, 0]], atol=1e-6)
    triangle = barycentric((0, 1, 3), 4, 4)
    assert triangle.shape == (10, 4)
    assert torch.allclose(triangle.sum(1), torch.ones(10))
    assert torch.allclose(model.interpolate(triangle, noise)[[0, 6, 9]], ends[[0, 1, 3]], atol=1e-6)
    with pytest.raises(ValueError, match="two or three"):
        barycentric((0,), 4, 5)
    with torch.no_grad():
        model.prior.means[1] = 100.0
    far = model.sample(50, torch.Generator().manual_seed(0), component=1)
    assert (far - model.sample(50, torch.Generator().manual_seed(0), component=2)).norm(dim=1).min() > 1
    with pytest.raises(IndexError):
        model.sample(1, component=4)


def test_models_without_shares_have_equal_ones():
    model = model_for()
    model.prior.shares.copy_(torch.tensor([0.5, 0.25, 0.25]))
    state = model.state_dict()
    del state["prior.shares"]
    model.load_state_dict(state)
    assert torch.equal(model.prior.shares, torch.full((3,), 1 / 3))
