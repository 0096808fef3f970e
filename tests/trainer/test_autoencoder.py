"""Autoencoders and priors: the paper's networks, the contract of models, and what is refused before training."""

import numpy as np
import pytest
import torch
from scipy import stats

from cluster.recipe import load_recipe
from data.errors import UserError
from data.shards import pack
from data.sources import open_source
from trainer.checkpoint import load_model, save_model
from trainer.families import priors as prior_settings
from trainer.families.autoencoder import AutoencoderSettings
from trainer.families.priors import PriorSettings
from trainer.models import priors
from trainer.models.autoencoder import Autoencoder
from trainer.models.classifier import Classifier
from trainer.models.priors import Prior
from trainer.settings import InitialisationSettings, TrainingSettings

# MNIST's, CelebA's and the digits' sizes, odd and wide images, a vector with the sides of none, vectors, one feature
SHAPES = [(28, 28), (64, 64, 3), (8, 8, 1), (29, 37, 1), (5, 40, 3), (20,), (1,)]


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_networks_have_the_supplements_parameters():
    model = Autoencoder((28, 28), 2)
    assert count(model.encoder, model.code) == 203_250
    assert count(model.expand, model.decoder) == 308_193
    assert count(model) == 203_250 + 308_193


def test_pooling_of_odd_sides_averages_what_is_there():
    """Keras' `same`: the last place of seven is the average of itself alone, not of itself and padding."""
    pool = next(layer for layer in Autoencoder((28, 28), 2).encoder if isinstance(layer, torch.nn.AvgPool2d))
    out = pool(torch.ones(1, 1, 7, 7))
    assert out.shape == (1, 1, 4, 4)
    assert torch.equal(out, torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_contract(shape, bounded, tmp_path, manifest_for):
    torch.manual_seed(0)
    model = Autoencoder(shape, 3, {"kind": "uniform"}, n_hidden=9, width=3, bounded=bounded, stochastic=bounded)
    model.set_scale(torch.rand(50, *shape, generator=torch.Generator().manual_seed(1)) * 3 + 7)
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(2))
    z = model.encode(x)
    assert z.shape == (5, 3)
    assert torch.allclose(model.encode(x[2:3]), z[2:3], atol=1e-5)  # no sample depends on the others
    assert torch.equal(model.encode(x.flatten(1)), z)
    assert torch.equal(model.reconstruct(x), model.decode(z))
    drawn = model.sample(6, torch.Generator().manual_seed(3))
    assert drawn.shape == (6, model.n_features)
    assert torch.equal(drawn, model.sample(6, torch.Generator().manual_seed(3)))
    assert not hasattr(model, "log_prob")
    assert not bounded or (drawn.min() >= 0 and drawn.max() <= 1)
    assert bounded or 4 < drawn.mean() < 13
    assert torch.allclose(model.outputs(model.raw(z)), model.decode(z))
    coded = model(x, 2)
    assert coded.raw.shape == (3, model.n_features)
    (coded.raw.square().mean() + coded.codes.square().mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    save_model(str(tmp_path), model, "autoencoder", manifest_for(shape), dequantised=False)
    again, _ = load_model(str(tmp_path))
    assert torch.equal(again.encode(x), z)
    with pytest.raises(ValueError, match="features"):
        model.encode(torch.zeros(2, model.n_features + 1))
    with pytest.raises(ValueError, match="codes have the shape"):
        model.decode(torch.zeros(2, 4))


def test_precision_and_layout_do_not_change_what_a_model_says(monkeypatch):
    monkeypatch.setattr("trainer.models.precision.has_bfloat16", lambda device_type: True)
    torch.manual_seed(0)
    plain = Autoencoder((8, 8), 2, width=4, channels_last=False)
    fast = Autoencoder((8, 8), 2, width=4, precision="bfloat16")
    fast.load_state_dict(plain.state_dict())
    x = torch.rand(4, 8, 8)
    trained = fast(x)
    assert trained.codes.dtype == trained.raw.dtype == torch.float32
    assert 0 < (trained.codes - plain(x).codes).abs().max() < 0.02  # of training alone
    assert torch.allclose(fast.eval().encode(x), plain.eval().encode(x), atol=1e-6)


def radius(kind):
    return Prior(kind, 2).sample(20_000, torch.Generator().manual_seed(0)).norm(dim=1).double().numpy()


@pytest.mark.parametrize(
    ("kind", "cdf"),
    [
        ("ring", lambda r: np.clip((r**2 - 0.25) / 0.75, 0, 1)),
        ("disc", lambda r: np.clip(r, 0, 1) ** 2),
        ("bowl", lambda r: np.clip(r, 0, 1) ** 4),
        ("gaussian", lambda r: stats.chi(2).cdf(r)),
    ],
)
def test_radii_of_priors_follow_their_densities(kind, cdf):
    """Kolmogorov-Smirnov; false alarm once in 1000 seeds, and the seed is fixed."""
    assert stats.kstest(radius(kind), cdf).pvalue > 1e-3
    z = Prior(kind, 2).sample(20_000, torch.Generator().manual_seed(1)).numpy()
    angle = np.arctan2(z[:, 1], z[:, 0]) / (2 * np.pi) + 0.5
    assert stats.kstest(angle, "uniform").pvalue > 1e-3


def test_priors_of_any_dimension():
    g = torch.Generator().manual_seed(0)
    for kind in ("uniform", "square"):
        z = Prior(kind, 2).sample(10_000, g).double().numpy()
        assert all(stats.kstest(column, "uniform", (-1, 2)).pvalue > 1e-3 for column in z.T)
    assert Prior("uniform", 128).sample(3, g).shape == (3, 128)
    mixture = Prior("mixture", 3, 2)
    mixture.set_mixture(torch.tensor([[5.0, 0, 0], [-5, 0, 0]]), torch.tensor([0.1, 1.0]), torch.tensor([3.0, 1.0]))
    z = mixture.sample(20_000, g)
    first = z[:, 0] > 0
    assert first.float().mean().item() == pytest.approx(0.75, abs=0.012)  # four standard errors
    assert z[first].std(0).max().item() == pytest.approx(0.1, rel=0.05)
    assert mixture.sample(0, g).shape == (0, 3)
    points = Prior("samples", 2, 4)
    points.set_samples(torch.arange(8.0).reshape(4, 2))
    assert set(points.sample(200, g)[:, 0].tolist()) == {0, 2, 4, 6}


def test_a_registered_model_never_imports_a_users_code():
    for kind in ("my.module.prior", "os.system", "points.npy"):
        with pytest.raises(ValueError, match="unknown prior"):
            Autoencoder((4,), 2, {"kind": kind})
    assert set(prior_settings._NAMED) | {"samples"} == set(priors.KINDS)


def spiral(n, rng):
    t = rng.random(n)
    return np.stack([t * np.cos(9 * t), t * np.sin(9 * t)], 1)


def test_a_users_prior_travels_as_its_samples(tmp_path, digits_pack):
    place = str(tmp_path / "points.npy")
    np.save(place, spiral(500, np.random.default_rng(1)))
    for kind, n in ((place, 500), (f"{__name__}.spiral", 65_536)):
        family = AutoencoderSettings(prior=kind, width=2)
        family.check(digits_pack, InitialisationSettings())
        model = family.build(digits_pack)
        assert model.prior.config == {"kind": "samples", "size": n}
        save_model(str(tmp_path / "model"), model, "autoencoder", digits_pack, dequantised=False)
        again, _ = load_model(str(tmp_path / "model"))
        z = again.prior.sample(5000, torch.Generator().manual_seed(0)).double()
        assert (z.norm(dim=1) <= 1).all()
        angle = torch.atan2(z[:, 1], z[:, 0])
        away = (9 * z.norm(dim=1) - angle + torch.pi) % (2 * torch.pi) - torch.pi
        assert away.abs().max() < 1e-4


def with_nan(n, rng):
    z = rng.random((n, 2))
    z[3] = np.nan
    return z


def of_three(n, rng):
    return rng.random((n, 3))


def failing(n, rng):
    raise RuntimeError("no luck")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (f"{__name__}.with_nan", ["1 of 65536 samples", "NaN", "repair"]),
        (f"{__name__}.of_three", ["3 dimensions", "the code 2", "model.n_latent=3"]),
        (f"{__name__}.failing", ["RuntimeError: no luck"]),
        (f"{__name__}.absent", ["cannot be imported", "PYTHONPATH"]),
        ("nothing.at.all", ["cannot be imported"]),
        ("nowhere.npy", ["nowhere.npy"]),
    ],
)
def test_users_priors_are_refused_before_training(kind, parts, digits_pack):
    with pytest.raises(UserError) as caught:
        AutoencoderSettings(prior=kind).check(digits_pack, InitialisationSettings())
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_files_that_are_no_prior(tmp_path):
    place = tmp_path / "x.npy"
    place.write_bytes(b"no array")
    with pytest.raises(UserError, match="no .npy file"):
        PriorSettings(kind=str(place)).points(2)
    np.save(place, np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="no .npy file"):
        PriorSettings(kind=str(place)).points(2)
    for found, part in (
        (np.zeros(5), r"instead of numbers \[n, K\]"),
        (np.array([[0, 1], [np.nan, 2]]), "1 of 2 samples hold NaN"),
        (np.ones((9, 2)), "all 9 samples are one point"),
        (np.zeros(((1 << 21) + 1, 2), np.float32), "give 2,097,152 at most"),
    ):
        np.save(place, found)
        with pytest.raises(UserError, match=part):
            PriorSettings(kind=str(place)).points(2)


def test_images_of_another_size_than_the_recipe_s_are_refused(digits_pack):
    with pytest.raises(UserError, match="the recipe is for images of 28 x 28: resize them") as caught:
        AutoencoderSettings(image=[28, 28]).check(digits_pack, InitialisationSettings())
    assert "\n" not in str(caught.value)
    AutoencoderSettings(image=[8, 8]).check(digits_pack, InitialisationSettings())


BASE = ["model={family: autoencoder}", "hierarchy=null", "initialisation={}", "training.dequantise=false"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.prior=ring", "model.n_latent=8"], ["prior ring has 2 dimensions, the code 8", "model.n_latent=2"]),
        (["model.prior=rign"], ["choose one of", "ring"]),
        (["model.prior={kind: mixture}"], ["needs means"]),
        (["model.prior={kind: mixture, means: [[0, 0, 1]]}"], ["3 dimensions", "n_latent=3"]),
        (["model.prior={kind: mixture, means: [[0, 0]], weights: [1, 2]}"], ["as many weights"]),
        (["model.prior={kind: ring, means: [[0, 0]]}"], ["leave them out of ring"]),
        (["model.regulariser.kind=kl", "model.prior=ring"], ["closed form for prior=gaussian"]),
        (["model.regulariser.kind=mmd", "model.regulariser.power=1"], ["power is of kind=sliced-wasserstein"]),
        (["model.regulariser.kind=kl", "model.regulariser.critic={}"], ["critic is of kind=gan"]),
        (["model.regulariser={kind: gan, global_batch: false}"], ["global_batch is of kind=sliced-wasserstein or mmd"]),
        (["training.batch_size=1", "scaling.workers=1"], ["from 1 sample", "training.batch_size (1)"]),
        (["training.batch_size=2", "model.regulariser.global_batch=false"], ["from 1 sample"]),
        (["model.codes_per_image=3"], ["multiple of 2 lanes", "codes_per_image (3)"]),
        (["model.reconstruction.squared=0"], ["no weight is above 0"]),
        (
            ["model.regulariser.kind=gan", "training.engine=deepspeed", "training.zero_stage=3"],
            ["zero_stage=3", "set it to 2"],
        ),
        (["model.prior.knd=ring"], ["unknown field", "kind"]),
    ],
)
def test_recipes_that_cannot_work_are_refused_when_read(overrides, parts):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", [*BASE, *overrides])
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_real_numbers_have_no_cross_entropy_and_set_the_scale(tmp_path, array_file):
    x = np.random.default_rng(0).normal([3, -200], [0.01, 50], (500, 2)).astype(np.float32)
    manifest = pack(open_source(f"array:{array_file(x)}"), str(tmp_path / "pack"))
    with pytest.raises(UserError, match="for pixels"):
        AutoencoderSettings(reconstruction={"cross_entropy": 1}).check(manifest, InitialisationSettings())
    family = AutoencoderSettings()
    family.check(manifest, InitialisationSettings())
    model = family.build(manifest)
    family.initialise(model, manifest, TrainingSettings(dequantise=False), InitialisationSettings())
    assert torch.allclose(model.offset, torch.from_numpy(x.mean(0)), rtol=0.05)


def test_the_classifier_of_deep_features_is_pinned_and_fits(tmp_path, digits_pack, manifest_for):
    torch.manual_seed(0)
    folder = str(tmp_path / "run")
    save_model(f"{folder}/model", Classifier((8, 8, 1), 10, 4, 6), "classifier", digits_pack, dequantised=False)
    family = {"reconstruction": {"squared": 0, "features": {"model": folder}}, "regulariser": {"kind": "kl"}}
    with pytest.raises(UserError, match="is not pinned: set .*sha256=[0-9a-f]{64}$") as caught:
        AutoencoderSettings.model_validate(family).check(digits_pack, InitialisationSettings())
    family["reconstruction"]["features"]["sha256"] = str(caught.value).rpartition("=")[2]
    settings = AutoencoderSettings.model_validate(family)
    assert settings.label == "VAE-DFC"
    settings.check(digits_pack, InitialisationSettings())
    with pytest.raises(UserError, match=r"shape \[9, 9\].* knows \[8, 8, 1\]"):
        settings.check(manifest_for((9, 9), 256), InitialisationSettings())
    family["reconstruction"]["features"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="other weights than 000000000000"):
        AutoencoderSettings.model_validate(family).check(digits_pack, InitialisationSettings())
