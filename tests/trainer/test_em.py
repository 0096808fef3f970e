"""EM against closed forms and scikit-learn, its monotone objective, its distribution, and data that is hard."""

import numpy as np
import pytest
import torch
from distributed import run_ranks
from mixtures import random_mfa

from data.errors import SharedError
from data.manifest import load_manifest
from trainer.em import _whitened, expectation, fit_em
from trainer.fit import Fit
from trainer.initialise import initialise_mfa
from trainer.loop import Callbacks
from trainer.models.mfa import MFA, log_joint_by_products
from trainer.settings import EMSettings, InitialisationSettings, TrainingSettings


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fitted(model, x, iterations, **settings):
    """Trains in place on fixed samples; returns the iterations' records."""
    found = []
    options = {"iterations": iterations, "tolerance": None, **settings}
    fit_em(model, lambda: [x], EMSettings(**options), on_iteration=found.append)
    return found


def started(x, n_components, n_factors, *, noise="diagonal", count=0.0, method="kmeans"):
    model = MFA(n_components, x.shape[1], n_factors, 1e-8, noise).to(x.dtype)
    settings = InitialisationSettings(method=method, noise_prior_count=count)
    initialise_mfa(model, x.numpy(), settings, seed=0)
    return model


def test_one_component_reaches_scikit_learn():
    from sklearn.decomposition import FactorAnalysis

    x = random_mfa(1, 12, 3, noise=0.3).sample(600, torch.Generator().manual_seed(0))
    theirs = FactorAnalysis(3, tol=1e-10, max_iter=10_000).fit(x.numpy()).score(x.numpy())
    ours = MFA(1, 12, 3).double()
    ours.set_components(torch.ones(1), x[:1] * 0, torch.randn(1, 12, 3, generator=torch.manual_seed(0)), x[:1] * 0 + 1)
    fitted(ours, x, 600)
    assert ours.log_prob(x).mean().item() == pytest.approx(theirs, abs=1e-4)


def test_one_isotropic_component_reaches_the_closed_form():
    """Tipping & Bishop 1999: A = U (Λ - σ² I)^½ up to a rotation, σ² the mean of the other eigenvalues."""
    x = random_mfa(1, 10, 3, noise=0.3).sample(400, torch.Generator().manual_seed(0))
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    variance = values[:-3].mean()
    leading = vectors[:, -3:] * np.sqrt(values[-3:] - variance)
    ours = MFA(1, 10, 3, noise="isotropic").double()
    ours.set_components(torch.ones(1), x[:1] * 0, torch.randn(1, 10, 3, generator=torch.manual_seed(0)), x[:1] * 0 + 1)
    fitted(ours, x, 300)
    a = ours.factor_loadings[0].detach().numpy()
    assert ours.noise_variance[0, 0].item() == pytest.approx(variance, rel=1e-8)
    assert np.allclose(a @ a.T, leading @ leading.T, atol=1e-8)
    assert np.allclose(ours.means[0].detach().numpy(), x.numpy().mean(0))


@pytest.mark.parametrize("noise", ["diagonal", "isotropic"])
@pytest.mark.parametrize("count", [0.0, 5.0])
@pytest.mark.parametrize("method", ["kmeans", "random", "k-subspaces"])
def test_the_objective_never_falls(noise, count, method):
    x = random_mfa(6, 8, 2, noise=0.3).sample(500, torch.Generator().manual_seed(1))
    model = started(x, 4, 3, noise=noise, count=count, method=method)
    objectives = [i.objective for i in fitted(model, x, 40)]
    gains = np.diff(objectives)
    assert gains.min() > -1e-11 * abs(objectives[-1])
    assert objectives[-1] > objectives[0]


@pytest.mark.parametrize("noise", ["diagonal", "isotropic"])
def test_it_ends_where_the_gradient_vanishes(noise):
    x = random_mfa(3, 6, 2, noise=0.5).sample(400, torch.Generator().manual_seed(1))
    model = started(x, 3, 2, noise=noise, count=4.0)
    fitted(model, x, 1200)
    log_prob, log_prior = model(x)
    ((log_prob.sum() + log_prior) / len(x)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() < 1e-5, name


def test_statistics_equal_dense_ones():
    """Against responsibilities and posteriors written out sample by sample."""
    model = random_mfa(3, 5, 2, noise=0.5)
    x = model.sample(40, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = expectation(model, model.precision(torch.float64), [x[:7], x[7:]])
        r = model.responsibilities(x)
        assert torch.allclose(found.mass, r.sum(0))
        for k in range(3):
            a, d = model.factor_loadings[k], model.noise_variance[k]
            u_map = torch.linalg.cholesky(torch.eye(2) + (a.T / d) @ a).inverse() @ (a.T / d)
            centred = x - model.means[k]
            assert torch.allclose(found.first[k], r[:, k] @ centred)
            assert torch.allclose(found.second[k], r[:, k] @ centred**2)
            assert torch.allclose(found.cross[k], (r[:, k : k + 1] * (centred @ u_map.T)).T @ centred)
        assert found.totals.tolist() == pytest.approx([model.log_prob(x).sum().item(), 40, 40])


def test_blocks_and_pair_limits_do_not_matter(monkeypatch):
    x = random_mfa(4, 6, 2, noise=0.5).sample(300, torch.Generator().manual_seed(1))
    models = [started(x, 4, 2) for _ in range(2)]
    fitted(models[0], x, 3)
    monkeypatch.setattr("trainer.em._PAIR_BYTES", 8 * 6 * 50)
    monkeypatch.setattr("trainer.em._BLOCK_BYTES", 8 * 6 * 70)
    fit_em(models[1], lambda: x.split(11), EMSettings(iterations=3, tolerance=None))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_screening_finds_nearly_the_same_mixture():
    """Screened by 40 of 64 features: the likelihood is within 0.1 nats of that of the full search."""
    x = random_mfa(5, 64, 3, noise=0.5).sample(2000, torch.Generator().manual_seed(1))
    exact, screened = started(x, 5, 3), started(x, 5, 3)
    fitted(exact, x, 20)
    fitted(screened, x, 20, screening_features=40)
    with torch.no_grad():
        assert screened.log_prob(x).mean().item() == pytest.approx(exact.log_prob(x).mean().item(), abs=0.1)


def test_float32_at_image_size_follows_float64():
    """784 features, many of them constant but for noise of 1e-6, means far apart."""
    truth = random_mfa(4, 784, 3, noise=1e-3)
    with torch.no_grad():
        truth.log_noise_variance[:, ::2] = np.log(1e-6)
        truth.factor_loadings[:, ::2] = 0
    x = truth.sample(800, torch.Generator().manual_seed(1))
    double, single = started(x, 4, 3, count=1.0), started(x.float(), 4, 3, count=1.0)
    last = fitted(double, x, 5)[-1], fitted(single, x.float(), 5)[-1]
    assert last[1].log_likelihood == pytest.approx(last[0].log_likelihood, rel=1e-4)


HARD = {
    "constant features": torch.cat([torch.zeros(50, 3), torch.randn(50, 2, generator=torch.manual_seed(0))], 1),
    "duplicates": torch.ones(40, 4),
    "two points": torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(20, 1),
    "one feature": torch.randn(60, 1, generator=torch.manual_seed(0)),
    "fewer samples than factors": torch.randn(7, 9, generator=torch.manual_seed(0)),
    "as many components as samples": torch.randn(4, 3, generator=torch.manual_seed(0)),
    "one far outlier": torch.cat([torch.randn(50, 3, generator=torch.manual_seed(0)), torch.full((1, 3), 1e6)]),
}


@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize("noise", ["diagonal", "isotropic"])
@pytest.mark.parametrize("count", [0.0, 2.0])
@pytest.mark.parametrize("method", ["kmeans", "random", "k-subspaces"])
def test_hard_data_gives_finite_models(what, noise, count, method):
    x = HARD[what]
    model = started(x, 4, 5, noise=noise, count=count, method=method)
    records = fitted(model, x, 12)
    assert all(np.isfinite(i.objective) for i in records)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model.log_prob(x)).all()
    assert model.mixing_coefficients.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n_factors", [0, 2])
def test_an_empty_component_is_seeded_anew(n_factors):
    """Two far clusters, two components, one of them lost in space: it comes to own a cluster."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(200, 2, generator=g), torch.randn(200, 2, generator=g) + 30])
    model = MFA(2, 2, n_factors).double()
    means = torch.tensor([[15.0, 15.0], [1e5, 1e5]])
    model.set_components(torch.ones(2), means, torch.ones(2, 2, n_factors), torch.full((2, 2), 100.0))
    records = fitted(model, x.double(), 40)
    assert sum(i.reseeded for i in records) == 1
    assert model.mixing_coefficients.detach().numpy() == pytest.approx([0.5, 0.5], abs=0.01)


def test_data_that_is_not_finite_is_refused():
    model = random_mfa(2, 3, 1)
    with pytest.raises(SharedError, match="EM stopped at iteration 1"):
        fitted(model, torch.full((5, 3), torch.nan, dtype=torch.float64), 2)


def test_it_stops_at_the_tolerance():
    x = random_mfa(1, 6, 2).sample(200, torch.Generator().manual_seed(1))
    model = started(x, 1, 2)
    found = []
    fit_em(model, lambda: [x], EMSettings(iterations=500, tolerance=1e-3), on_iteration=found.append)
    assert 1 < len(found) < 100


SETTINGS = TrainingSettings(method="em", em=EMSettings(iterations=6, checkpoint_every=2), augment=["mirror"])


def starting_model():
    model = MFA(4, 64, 3, 1e-5).double()
    g = torch.Generator().manual_seed(0)
    loadings = torch.randn(4, 64, 3, generator=g) * 0.1
    model.set_components(torch.ones(4), torch.rand(4, 64, generator=g), loadings, torch.full((4, 64), 0.05))
    model.set_noise_prior(3.0, torch.full((64,), 0.05))
    return model


def fit_digits(shards, rank=0, world_size=1, resume=None, settings=SETTINGS):
    """EM on the packed digits; returns the final state and all checkpoints."""
    manifest = load_manifest(shards)
    model = starting_model() if rank == 0 else MFA(4, 64, 3, 1e-5).double()
    saved = {}
    fit = Fit(model, manifest, settings, rank=rank, world_size=world_size)
    return fit.run(Callbacks(on_checkpoint=saved.__setitem__), resume), saved


def on_rank(rank, shards):
    return fit_digits(shards, rank, 2)


@pytest.fixture(scope="module")
def by_rank(digits_pack, tmp_path_factory):
    import test_em  # by its plain name, so that spawned processes find the function

    return run_ranks(test_em.on_rank, 2, tmp_path_factory.mktemp("ranks"), digits_pack.base)


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def test_two_ranks_equal_one(by_rank, digits_pack):
    alone, _ = fit_digits(digits_pack.base)
    assert difference(alone, by_rank[0][0]) < 1e-8
    assert difference(by_rank[0][0], by_rank[1][0]) == 0


def test_resumed_equals_uninterrupted(digits_pack):
    whole, saved = fit_digits(digits_pack.base)
    assert sorted(saved) == [2, 4, 6]
    again, _ = fit_digits(digits_pack.base, resume=(4, saved[4]))
    assert difference(whole, again) < 1e-12


@pytest.mark.parametrize("noise", [1e-3, 1e-6])
def test_float32_loses_nothing_to_cancellation(noise):
    """Loadings 0.5 over noise of 1e-6: |D^-½ (x - μ)|² is a million times |D^-½ (x - μ - A z)|²."""
    double = random_mfa(3, 784, 4, noise=noise)
    with torch.no_grad():
        double.means.mul_(0.01)
    x = double.sample(60, torch.Generator().manual_seed(1)).float()
    single = MFA(3, 784, 4)
    single.load_state_dict({name: value.float() for name, value in double.state_dict().items()})
    exact = single.double()
    with torch.no_grad():
        theirs = expectation(exact, exact.precision(torch.float64), [x.double()])
        single = MFA(3, 784, 4)
        single.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
        ours = expectation(single, single.precision(torch.float32), [x])
    assert (ours.totals[0] - theirs.totals[0]).abs().item() / 60 < 0.05
    assert torch.allclose(ours.mass, theirs.mass, atol=0.02)


def test_the_error_bound_holds_for_large_images():
    """12,288 features: no component's log-density is further from float64 than the bound that goes with it."""
    model = random_mfa(3, 12_288, 5, noise=1e-3)
    x = model.sample(20, torch.Generator().manual_seed(1)).float()
    with torch.no_grad():
        single = model.float()
        ours, bound = log_joint_by_products(x, single.precision(torch.float32))
        exact, _ = log_joint_by_products(x.double(), single.double().precision(torch.float64))
    assert ((ours.double() - exact).abs() < bound).all()


def test_whitening_survives_covariances_beyond_double_precision():
    """Where Cholesky fails, the large directions are still whitened: F⁻¹ target has the norm that Σ⁻¹ gives."""
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.manual_seed(0), dtype=torch.float64))[0]
    covariance = q @ torch.diag(torch.tensor([1e20, 1e19, 1.0], dtype=torch.float64)) @ q.T
    covariance = (covariance + covariance.T)[None] / 2 - 1e4 * torch.eye(3, dtype=torch.float64)
    target = (q[:, :2] * torch.tensor([1e10, 1e9])).sum(1)[None, :, None]
    found = _whitened(covariance, target)
    assert torch.isfinite(found).all()
    assert found.square().sum().item() == pytest.approx(1 + 0.1, rel=1e-3)


def test_it_goes_on_after_a_component_was_seeded_anew():
    """The first pass after a re-seeding may be worse than the one before: that is not the end."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(300, 1, generator=g), torch.randn(300, 1, generator=g) + 4]).double()
    model = MFA(2, 1, 0).double()
    model.set_components(torch.ones(2), torch.tensor([[2.0], [1e4]]), torch.zeros(2, 1, 0), torch.full((2, 1), 5.0))
    found = []
    fit_em(model, lambda: [x], EMSettings(iterations=60), on_iteration=found.append)
    assert sum(i.reseeded for i in found) == 1
    best = MFA(2, 1, 0).double()
    best.set_components(torch.ones(2), torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1, 0), torch.ones(2, 1))
    assert found[-1].log_likelihood > best.log_prob(x).mean().item() - 0.01


def test_no_component_is_seeded_at_the_end():
    x = torch.randn(100, 2, generator=torch.manual_seed(0)).double()
    model = MFA(2, 2, 1).double()
    model.set_components(torch.ones(2), torch.tensor([[0.0, 0.0], [1e5, 1e5]]), torch.ones(2, 2, 1), torch.ones(2, 2))
    found = []
    fit_em(model, lambda: [x], EMSettings(iterations=10), done=8, on_iteration=found.append)
    assert [i.reseeded for i in found] == [0, 0]
    assert [i.last for i in found] == [False, True]


def test_a_resumed_run_ends_at_the_same_pass(digits_pack):
    """The objective of the last pass before the checkpoint decides whether the first one after it is the end."""
    settings = SETTINGS.model_copy(update={"em": EMSettings(iterations=200, tolerance=0.02, checkpoint_every=1)})
    whole, saved = fit_digits(digits_pack.base, settings=settings)
    assert max(saved) == 200
    before = max(step for step in saved if step < 200)
    assert before < 100
    for start in (before, before - 1):
        again, steps = fit_digits(digits_pack.base, resume=(start, saved[start]), settings=settings)
        assert difference(whole, again) < 1e-12
        assert max(step for step in steps if step < 200) == before if start < before else sorted(steps) == [200]


def test_mirrored_training_sees_every_image_and_its_mirror_image(digits_pack):
    from data.stream import read_blocks

    blocks = read_blocks(digits_pack, "train", dequantise_seed=2**32)
    images = torch.cat([torch.from_numpy(block["x"]) for block in blocks]).double()
    both = torch.cat([images, images.flip(2)]).flatten(1)
    state, _ = fit_digits(digits_pack.base)
    model = starting_model()
    fit_em(model, lambda: [both], SETTINGS.em)
    assert (state["model.module.means"] - model.means).abs().max() < 1e-8
