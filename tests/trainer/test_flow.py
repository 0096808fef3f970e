"""Flows and MixFlow: the contract of models, exact inverse and determinant, reference libraries, and the weights."""

import math

import numpy as np
import pytest
import torch
from distributed import run_ranks
from flows import random_flow
from scipy.stats import multivariate_normal

from data.errors import UserError
from data.manifest import load_manifest
from data.shards import pack
from data.sources import open_source
from data.stream import read_blocks
from data.toys import toy
from trainer.checkpoint import load_model, save_model
from trainer.families.flow import FlowSettings
from trainer.fit import Fit, trained_tensors
from trainer.initialise_flow import initialise_flow
from trainer.loop import Callbacks
from trainer.models.flow import Flow
from trainer.settings import InitialisationSettings, OptimiserSettings, TrainingSettings

# one component, many, one feature, an odd number of features, images in one scale and in two
FLOWS = {
    "nice": {"shape": [2], "n_couplings": 4},
    "mixflow": {"shape": [5], "n_components": 3, "n_couplings": 3, "residual": True, "n_layers": 3},
    "real-nvp": {"shape": [6], "n_components": 2, "coupling": "affine", "affine": "full", "base": "logistic"},
    "naive": {"shape": [4], "n_components": 2, "affine": "none"},
    "one feature": {"shape": [1], "n_components": 2},
    "em": {"shape": [3], "n_components": 4, "weights": "em"},
    "pixels": {"shape": [2, 3, 1], "n_components": 2, "logit": 0.05, "coupling": "affine"},
    "images": {"shape": [6, 4, 3], "n_components": 2, "network": "conv", "n_couplings": 1, "width": 4},
    "two scales": {
        **{"shape": [8, 4], "n_components": 2, "network": "conv", "n_couplings": 3, "width": 4},
        **{"coupling": "affine", "logit": 0.01},
    },
}


def rows_for(model, n=9, seed=1):
    """Samples in [0, 1], where each model has a density."""
    return torch.rand(n, model.n_features, generator=torch.Generator().manual_seed(seed)).to(model.log_scale.dtype)


@pytest.mark.parametrize("name", FLOWS)
def test_contract(name, tmp_path, manifest_for):
    model = random_flow(**FLOWS[name], dtype=torch.float32, size=0.1).train()
    t, d = model.n_components, model.n_features
    x = rows_for(model)
    joint, responsibilities = model.component_log_prob(x), model.responsibilities(x)
    assert joint.shape == responsibilities.shape == (9, t)
    assert torch.allclose(responsibilities.sum(1), torch.ones(9))
    assert torch.allclose(model.log_prob(x.reshape(9, *model.shape)), joint.logsumexp(1))
    assert torch.allclose(model.log_prob(x[2:3]), model.log_prob(x)[2:3], rtol=1e-4)
    drawn = model.sample(50, torch.Generator().manual_seed(3))
    assert drawn.shape == (50, d)
    assert torch.isfinite(drawn).all()
    assert torch.equal(drawn, model.sample(50, torch.Generator().manual_seed(3)))
    assert model.sample(0).shape == (0, d)
    codes = model.encode(x)
    assert codes.shape == (9, 1 + d)
    assert torch.equal(codes[:, 0], joint.argmax(1).float())
    assert torch.allclose(model.decode(codes), x, atol=1e-4)
    before = model.component_log_prob(x)  # the weights move with the batch where they are learnt by EM
    log_prob, log_prior, samples, components = model(x.reshape(9, *model.shape), 60)
    assert torch.allclose(log_prob, before.logsumexp(1))
    assert log_prior.shape == ()
    assert samples.shape == (60, d)
    assert components.shape == (60,)
    assert components.dtype == torch.int64
    assert set(components.tolist()) <= set(range(t))
    (samples.square().mean() - log_prob.mean() - log_prior).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    nothing, log_prior, samples, _ = model(None, 60)
    assert nothing is None
    (samples.square().mean() + log_prior).backward()
    moved = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {key for key, p in model.named_parameters() if key != "mixing.logits"}
    save_model(str(tmp_path), model, "flow", manifest_for(tuple(model.shape)), dequantised=False)
    again, _ = load_model(str(tmp_path))
    assert torch.equal(again.log_prob(x), model.eval().log_prob(x))
    assert again.config == model.config
    assert f"n_components={t}" in repr(model)
    with pytest.raises(ValueError, match="features"):
        model.log_prob(torch.zeros(2, d + 1))
    with pytest.raises(ValueError, match="columns"):
        model.decode(torch.zeros(2, d))
    with pytest.raises(ValueError, match="component"):
        model.decode(torch.full((2, d + 1), float(t)))


@pytest.mark.parametrize("name", FLOWS)
def test_the_inverse_is_exact(name):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = random_flow(**FLOWS[name], dtype=dtype, size=0.1)
        x = rows_for(model, 50)
        z, _ = model.latents(x)
        for c in range(model.n_components):
            assert (model.generate(z[c], torch.full((50,), c)) - x).abs().max() < tolerance
        mixed = torch.arange(50) % model.n_components
        assert (model.generate(z[mixed, torch.arange(50)], mixed) - x).abs().max() < tolerance


@pytest.mark.parametrize("name", FLOWS)
def test_log_determinant_equals_autograd_s(name):
    model = random_flow(**FLOWS[name])
    x = rows_for(model, 2)
    z, log_det = model.latents(x)
    assert z.shape == (model.n_components, 2, model.n_features)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda row: model.latents(row[None])[0][:, 0], x[i])
        assert torch.allclose(torch.linalg.slogdet(jacobian)[1], log_det[:, i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("base", ["gaussian", "logistic"])
@pytest.mark.parametrize("options", [{}, {"coupling": "affine", "affine": "full"}])
def test_density_integrates_to_one(base, options):
    model = random_flow([2], 3, base=base, size=0.2, **options)
    axis = torch.linspace(-50, 50, 501, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = (
        sum(model.log_prob(part).exp().sum().item() for part in grid.split(200_000)) * (axis[1] - axis[0]).item() ** 2
    )
    assert total == pytest.approx(1, abs=2e-3)


def test_density_of_pixels_integrates_to_one_over_its_support():
    model = random_flow([2, 1, 1], 2, logit=0.05, size=0.2)
    axis = (torch.arange(600, dtype=torch.float64) + 0.5) / 600 * 1.2 - 0.1
    total = model.log_prob(torch.cartesian_prod(axis, axis)).exp().sum().item() * (1.2 / 600) ** 2
    assert total == pytest.approx(1, abs=1e-3)
    outside = torch.tensor([[0.5, 3.0]], dtype=torch.float64)
    assert model.log_prob(outside).item() == -math.inf
    assert torch.allclose(model.responsibilities(outside)[0], model.mixing_coefficients)


def test_the_logit_is_exact_in_float32_at_both_ends():
    """Pixels of 8 bits at 0 and at 1 - 2^-24, α = 1e-6: a nat per pixel would be lost to 1 - p."""
    x = torch.tensor([[0.0, 2**-24, 0.5, 1 - 2**-20, 1 - 2**-24]])
    values = [Flow([5], logit=1e-6).to(dtype).log_prob(x.to(dtype)).item() for dtype in (torch.float32, torch.float64)]
    assert values[0] == pytest.approx(values[1], abs=1e-3)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_likelihood_equals_zuko_s_with_copied_weights(coupling):
    """NICE and Real NVP of three couplings, their networks' weights put into zuko's transforms."""
    transforms = pytest.importorskip("zuko.transforms")
    model = random_flow([5], coupling=coupling, n_couplings=3, affine="none")
    x = rows_for(model, 20)
    even = torch.tensor([True, False, True, False, True])
    steps = []
    for i, layer in enumerate(model.body.layers):

        def meta(a, network=layer.network):
            weights = [p[0] for p in network.weights]
            biases = [p[0, 0] for p in network.biases]
            for weight, bias in zip(weights[:-1], biases[:-1]):
                a = torch.relu(a @ weight + bias)
            out = a @ weights[-1] + biases[-1]
            if coupling == "additive":
                return transforms.DependentTransform(transforms.AdditiveTransform(out), 1)
            shift, scale = out.chunk(2, -1)
            return transforms.DependentTransform(transforms.MonotonicAffineTransform(shift, scale, slope=1e-3), 1)

        steps.append(transforms.CouplingTransform(meta, even if i % 2 == 0 else ~even))
    h, log_det = transforms.ComposedTransform(*steps).call_and_ladj(x)
    # After three couplings our halves have changed places: S belongs to (odd, even).
    h = torch.cat([h[:, ~even], h[:, even]], 1) * model.log_scale[0].exp()
    normal = torch.distributions.Normal(0.0, 1.0)
    theirs = normal.log_prob(h).sum(1) + log_det + model.log_scale.sum()
    assert torch.allclose(model.log_prob(x), theirs, rtol=0, atol=1e-10)


def test_without_couplings_it_is_a_gaussian_mixture():
    """The full affine layer against SciPy's multivariate normal."""
    model = random_flow([3], 2, n_couplings=0, affine="full")
    x = rows_for(model, 30)
    parts = []
    for c in range(2):
        triangle = model.lower[c].tril(-1) / 3 + model.log_diagonal[c].exp().diag()
        # z is in the order of even, then odd features; the affine layer in that of the data.
        whitening = model.log_scale[c][[0, 2, 1]].exp().diag() @ triangle @ (-model.log_width[c]).exp().diag()
        covariance = torch.linalg.inv(whitening.T @ whitening).detach().numpy()
        density = multivariate_normal(model.shift[c].detach().numpy(), covariance)
        parts.append(density.logpdf(x.numpy()) + math.log(model.mixing_coefficients[c].item()))
    assert np.allclose(model.log_prob(x).detach().numpy(), np.logaddexp.reduce(parts, axis=0), atol=1e-10)


def test_samples_have_the_model_s_density():
    """Histogram of 200,000 samples on a grid of 64 cells against the integrated density: χ² at odds below 1e-4."""
    from scipy.stats import chi2

    model = random_flow([2], 3, dtype=torch.float32, size=0.2, coupling="affine")
    x = model.sample(200_000, torch.Generator().manual_seed(0)).double()
    low, high = x.quantile(0.02, 0), x.quantile(0.98, 0)
    fine = [low[i] + (high[i] - low[i]) * (torch.arange(800) + 0.5) / 800 for i in range(2)]
    cell = ((high - low) / 800).prod()
    density = model.log_prob(torch.cartesian_prod(*fine).float()).double().exp().detach() * cell
    expected = density.reshape(8, 100, 8, 100).sum((1, 3)).flatten() * len(x)
    place = ((x - low) / (high - low) * 8).floor().long()
    inside = ((place >= 0) & (place < 8)).all(1)
    counts = torch.bincount(place[inside, 0] * 8 + place[inside, 1], minlength=64).double()
    full = expected > 20
    statistic = ((counts - expected).square() / expected)[full].sum().item()
    assert chi2.sf(statistic, int(full.sum())) > 1e-4


def test_an_outlier_an_empty_component_and_duplicates_stay_finite():
    model = random_flow([4], 3, dtype=torch.float32).train()
    with torch.no_grad():
        model.mixing.logits[1] = -200.0
    x = torch.cat([torch.full((2, 4), 1e6), torch.zeros(5, 4)])
    log_prob, log_prior, samples, _ = model(x, 20)
    (samples.mean() - log_prob.mean() - log_prior).backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(model.responsibilities(x)).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.live_components.tolist() == [0, 2]


@pytest.mark.parametrize("method", ["kmeans", "random"])
@pytest.mark.parametrize("affine", ["diagonal", "full"])
def test_starting_points_survive_what_data_there_are(method, affine):
    """Few distinct points, one far away, a constant feature; more components than points."""
    points = np.array([[0, 0, 7], [0, 1, 7], [1, 0, 7], [1, 1, 7], [1e4, 1e4, 7]], np.float32)
    x = np.repeat(points, [10, 10, 10, 10, 1], axis=0)
    model = Flow([3], 8, affine=affine)
    initialise_flow(model, x, InitialisationSettings(method=method), seed=0)
    assert torch.isfinite(model.log_prob(torch.from_numpy(x))).all()
    assert torch.isfinite(model.sample(20)).all()
    assert model.mixing_coefficients.sum().item() == pytest.approx(1)


def test_the_full_start_is_each_cluster_s_gaussian():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(2, 3, 3))
    x = np.concatenate([rng.normal(size=(4000, 3)) @ mixing[k].T + 30 * k for k in range(2)]).astype(np.float32)
    model = Flow([3], 2, affine="full")
    initialise_flow(model, x, InitialisationSettings(), seed=0)
    parts = [multivariate_normal.logpdf(x, x[s].mean(0), np.cov(x[s].T)) for s in (slice(0, 4000), slice(4000, 8000))]
    best = np.logaddexp.reduce(np.stack(parts) + math.log(0.5), axis=0).mean()
    # The common tenth of the covariance costs a few hundredths of a nat.
    assert model.log_prob(torch.from_numpy(x)).mean().item() == pytest.approx(best, abs=0.1)


def test_em_takes_a_damped_step_to_the_responsibilities():
    model = random_flow([3], 4, weights="em", weight_rate=0.25, weight_start=2, dtype=torch.float32).train()
    x = rows_for(model, 40)
    start = model.mixing_coefficients
    for _ in range(2):
        model(x)
    assert torch.equal(model.mixing_coefficients, start)
    shares = model.responsibilities(x).double().mean(0).detach()
    model(x)
    assert torch.allclose(model.mixing_coefficients, start + 0.25 * (shares - start), atol=1e-6)
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert torch.allclose(model.mixing_coefficients, start + 0.25 * (shares - start), atol=1e-6)


@pytest.mark.parametrize("prior", [{"entropic_weight": 0.3}, {"stick_breaking": 0.02}])
def test_em_s_weights_maximise_the_posterior_that_gradients_climb(prior):
    """argmax of Σ r_c log π_c + log-prior / N, by the closed form and by gradient ascent on the logits."""
    shares = torch.tensor([0.45, 0.1, 0.3, 0.15], dtype=torch.float64)
    model = Flow([2], 4, n_train=1000, **prior).double()
    best = model.mixing.best(shares)
    assert best.sum().item() == pytest.approx(1)
    optimiser = torch.optim.LBFGS(
        [model.mixing.logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimiser.zero_grad()
        value = -(shares * model.mixing.logits.log_softmax(0)).sum() - model.log_prior() / 1000
        value.backward()
        return value

    optimiser.step(loss)
    assert torch.allclose(model.mixing_coefficients, best, atol=1e-4)


def test_what_stands_for_little_more_than_its_share_is_not_pruned():
    model = Flow([2], 3, weights="em", weight_rate=1.0, stick_breaking=0.02)
    model.mixing.learn(torch.tensor([[0.5, 0.47, 0.03]]))
    assert model.mixing_coefficients[2].item() == pytest.approx(0.01, abs=1e-3)  # less than κ
    assert model.live_components.tolist() == [0, 1, 2]
    model.mixing.learn(torch.tensor([[0.5, 0.485, 0.015]]))
    assert model.live_components.tolist() == [0, 1]


def test_weights_by_em_bear_samples_without_density():
    model = Flow([2], 2, weights="em", weight_rate=1.0, logit=0.01)
    x = torch.tensor([[0.5, 0.5], [2.0, 0.5]])  # the second lies outside of the logit's support
    log_prob, _ = model.train()(x)
    assert log_prob[1] == -math.inf
    assert torch.isfinite(model.mixing_coefficients).all()


def test_stick_breaking_takes_the_weight_of_what_is_too_small():
    model = Flow([2], 6, weights="em", stick_breaking=0.02)
    shares = torch.tensor([0.01, 0.5, 0.0, 0.3, 0.015, 0.175], dtype=torch.float64)
    best = model.mixing.best(shares)
    assert (best > 0).tolist() == [False, True, False, True, False, True]
    model.mixing.set(best)
    assert model.live_components.tolist() == [1, 3, 5]


def ring_settings(steps=250, learning_rate=5e-3, **training):
    return TrainingSettings(
        steps=steps,
        batch_size=200,
        lanes=2,
        checkpoint_every=100,
        optimiser=OptimiserSettings(learning_rate=learning_rate, beta1=0.5, beta2=0.9, schedule="cosine"),
        **training,
    )


def trained(shards, family, settings, rank=0, world_size=1, *, resume=None, saved=None, start="kmeans", tilt=False):
    """The final tensors, starting on each rank from other weights; with `tilt`, from unequal ones."""
    manifest = load_manifest(shards)
    torch.manual_seed(rank)
    model = family.build(manifest)
    if rank == 0:
        family.initialise(model, manifest, settings, InitialisationSettings(method=start, n_init=10))
    if tilt:
        model.mixing.set(torch.tensor([1.0, 2, 3, 4, 5, 6]) / 21)
    fit = Fit(model, manifest, settings, rank=rank, world_size=world_size, lanes=2, objective=family.objective)
    keep = saved if saved is not None else {}
    state = fit.run(Callbacks(on_checkpoint=keep.__setitem__), resume)
    return trained_tensors(state)


@pytest.fixture(scope="module")
def ring_pack(tmp_path_factory):
    return pack(open_source("ring:6,samples=12000"), str(tmp_path_factory.mktemp("ring")))


def gap(tensors, family, manifest):
    """Nats per sample by which a flow's likelihood of fresh samples of the ring is below the truth."""
    model = family.build(manifest)
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    ring = toy("ring")
    x, _ = ring.draw(5000, np.random.default_rng(99))
    with torch.no_grad():
        return (ring.log_density(x) - model.eval().log_prob(torch.from_numpy(x)).numpy()).mean(), model


def test_em_and_gradients_learn_the_same_mixture(ring_pack):
    """From weights that are far off: both end at sixths, and near the truth."""
    for weights in ("em", "gradient"):
        family = FlowSettings(n_components=6, n_couplings=2, width=24, weights=weights)
        tensors = trained(ring_pack.base, family, ring_settings(400), tilt=True)
        missing, model = gap(tensors, family, ring_pack)
        assert missing < 0.02
        assert (model.mixing_coefficients - 1 / 6).abs().max() < 0.02


@pytest.mark.parametrize(("weights", "share", "rate"), [("em", 0.01, 5e-3), ("gradient", 0.03, 2e-2)])
def test_stick_breaking_finds_the_number_of_components(ring_pack, weights, share, rate):
    """Ten components for six modes; the prior's pull on the weights of the others costs some hundredths of a nat."""
    family = FlowSettings(n_components=10, n_couplings=0, weights=weights, stick_breaking=share, weight_rate=0.2)
    settings = ring_settings(600, learning_rate=rate)
    missing, model = gap(trained(ring_pack.base, family, settings), family, ring_pack)
    assert len(model.live_components) == 6
    assert missing < 0.04


def test_pre_training_gives_each_component_its_label(ring_pack):
    family = FlowSettings(n_components=6, n_couplings=2, width=24, affine="diagonal", pretrain_steps=250)
    tensors = trained(ring_pack.base, family, ring_settings(), start="random")
    _, model = gap(tensors, family, ring_pack)
    block = next(iter(read_blocks(ring_pack, "test")))
    found = model.component_log_prob(torch.from_numpy(block["x"])).argmax(1)
    assert (found.numpy() == block["label"]).mean() > 0.99


ENGINES = {"ddp": {}, "zero-0": {"engine": "deepspeed"}, "zero-2": {"engine": "deepspeed", "zero_stage": 2}}


@pytest.mark.parametrize(
    ("family", "source"),
    [
        ({"n_components": 6, "n_couplings": 2, "width": 30}, "ring:6,samples=20000"),
        ({"n_couplings": 2, "coupling": "affine", "network": "conv", "width": 8, "logit": 1e-3}, "digits"),
    ],
)
def test_trained_flows_are_inverted(family, source, tmp_path):
    """Relative to the spread of what a flow sees, 1e-5 in float32: the ring's mixture, and a Real NVP of digits."""
    manifest, family = pack(open_source(source), str(tmp_path / "pack")), FlowSettings(**family)
    settings = ring_settings(150)
    model = family.build(manifest)
    tensors = trained(manifest.base, family, settings)
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    noise = None if manifest.levels is None else 0
    x = torch.from_numpy(next(read_blocks(manifest, "test", dequantise_seed=noise))["x"][:200]).flatten(1)
    with torch.no_grad():
        z, _ = model.eval().latents(x)
        y = model.preprocess(x)[0]
        for c in range(model.n_components):
            back = model.preprocess(model.generate(z[c], torch.full((len(x),), c)))[0]
            assert (back - y).abs().max() < 1e-5 * max(1.0, float(y.abs().max()))


SMALL = FlowSettings(n_components=3, n_couplings=2, width=8, weights="em", weight_start=5, pretrain_steps=3)


def on_rank(rank, shards):
    """Every engine, uninterrupted and resumed."""
    out = {}
    for name, options in ENGINES.items():
        saved: dict = {}
        settings = ring_settings(20, **options).model_copy(update={"checkpoint_every": 8})
        out[name] = trained(shards, SMALL, settings, rank, 2, saved=saved)
        out[name + " resumed"] = trained(shards, SMALL, settings, rank, 2, resume=(8, saved[8]))
    return out


def test_two_workers_learn_weights_by_em_as_one_does(ring_pack, tmp_path):
    """DDP and DeepSpeed, resumed or not: the responsibilities of the whole batch move the weights on every rank."""
    import test_flow  # by its plain name, so that spawned processes find the function

    alone = trained(ring_pack.base, SMALL, ring_settings(20))
    ranks = run_ranks(test_flow.on_rank, 2, tmp_path, ring_pack.base)
    for name, tensors in ranks[0].items():
        assert int(tensors["mixing.batches_seen"]) == 20
        for key, value in alone.items():
            assert torch.equal(tensors[key], ranks[1][name][key]), (name, key)
            assert torch.allclose(value, tensors[key], atol=2e-5), (name, key)


@pytest.mark.parametrize("instructions", [True, False])
def test_bfloat16_products_are_for_training_alone_and_for_machines_that_have_them(monkeypatch, instructions):
    monkeypatch.setattr("trainer.models.precision.has_bfloat16", lambda device_type: instructions)
    exact, model = (random_flow([6], 2, dtype=torch.float32, precision=p) for p in ("float32", "bfloat16"))
    x = rows_for(model, 200)
    assert torch.equal(exact.log_prob(x), model.log_prob(x))
    rough = model.train()(x)[0]
    assert rough.dtype == torch.float32
    error = (rough - exact.log_prob(x)).abs().max()
    assert error < 0.1
    assert bool(error > 0) == instructions
    rough.mean().backward()
    exact.log_prob(x).mean().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, exact))
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize(
    ("options", "shape", "levels", "part"),
    [
        ({"network": "conv"}, (7, 8, 1), 256, "even"),
        ({"network": "conv"}, (8,), None, "model.network=mlp"),
        ({"logit": 0.05}, (4,), None, "model.logit=null"),
        ({"affine": "none"}, (1,), None, "model.affine=diagonal"),
        ({"pretrain_steps": 5, "n_components": 2}, (4,), None, "no labels"),
    ],
)
def test_data_that_a_flow_cannot_be_trained_on(options, shape, levels, part, tmp_path, array_file):
    x = np.zeros((20, *shape), np.float32 if levels is None else np.uint8)
    manifest = pack(open_source(f"array:{array_file(x)}"), str(tmp_path / "pack"))
    with pytest.raises(UserError, match=part) as caught:
        FlowSettings(**options).check(manifest, InitialisationSettings())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="20 samples|16 samples"):
        FlowSettings(n_components=50).check(manifest, InitialisationSettings())
    with pytest.raises(UserError, match="kmeans or random"):
        FlowSettings().check(manifest, InitialisationSettings(method="k-subspaces"))
