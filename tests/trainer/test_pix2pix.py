"""Details for a mixture's samples: the models' contract, the losses by hand, the mixture that stands still, workers."""

import math

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from mixtures import random_mfa

from cluster.models import settle_mixture
from cluster.recipe import load_recipe
from data.errors import UserError
from data.manifest import load_manifest
from data.stream import ShardStream
from deploy.served_model import load_network, tasks_of
from deploy.sources import write_sources
from trainer.checkpoint import load_model, save_model
from trainer.engines import make_engine
from trainer.fit import trained_tensors
from trainer.loop import Callbacks, train
from trainer.models.pix2pix import PatchCritic, Pix2Pix
from trainer.objectives.pix2pix import ImageTranslation
from trainer.players import make_player
from trainer.settings import OptimiserSettings, TrainingSettings


def model_for(shape=(8, 8), k=3, factors=2, noise="diagonal"):
    model = Pix2Pix(shape, k, factors, width=4, noise=noise)
    mixture = random_mfa(k, math.prod(shape), factors, dtype=torch.float32)
    if noise == "diagonal":
        model.mixture.load_state_dict(mixture.state_dict())
    return model


def objective_for(model, steps=10):
    sgd = OptimiserSettings(name="sgd", learning_rate=0.1, beta1=0.5)
    critic = PatchCritic(model.shape, 4, 1)
    return ImageTranslation(make_player(model, sgd, steps), make_player(critic, sgd, steps), 10.0)


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (64, 64, 3), (8, 24)])
def test_contract(shape, tmp_path, manifest_for):
    torch.manual_seed(0)
    model = model_for(shape)
    x = model.sample(5, torch.Generator().manual_seed(2))
    assert x.shape == (5, model.n_features)
    assert 0 <= x.min() < x.max() <= 1
    plain = model.plain(5, torch.Generator().manual_seed(2))
    assert torch.allclose(model(plain)[1:2], x[1:2], atol=1e-5)  # no sample depends on the others
    assert torch.allclose(model(plain.reshape(5, *shape)), x)
    assert torch.equal(model.responsibilities(plain), model.mixture.responsibilities(plain))
    assert model.reconstruct(x.detach()).shape == x.shape
    assert tasks_of(model)[:2] == ["responsibilities", "sample"]
    assert not any(name.startswith("mixture") for name, _ in model.named_parameters())
    values = PatchCritic(shape, 4, 2 if min(shape) > 8 else 1)(plain, x)
    assert values.shape[0] == 5
    assert values.shape[1] > 1
    save_model(str(tmp_path / "m"), model, "pix2pix", manifest_for(shape), dequantised=False)
    again, _ = load_model(str(tmp_path / "m"))
    assert torch.equal(again.sample(5, torch.Generator().manual_seed(2)), x)
    write_sources("pix2pix", tmp_path / "sources")
    twin = load_network(str(tmp_path / "sources"), "pix2pix")(**model.config)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.sample(5, torch.Generator().manual_seed(2)), x)


def test_images_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="halved"):
        Pix2Pix((9, 9), 2, 1)
    with pytest.raises(ValueError, match="1 to 2 stages"):
        PatchCritic((28, 28), 4, 3)
    assert Pix2Pix((8, 8), 2, 1, noise="isotropic").config["noise"] == "isotropic"


@pytest.mark.parametrize("stages", [1, 2])
def test_the_critic_sees_patches(stages):
    """A logit sees 3 places of the last grid, and each of these the pixels below it: 8, or 18, in all."""
    torch.manual_seed(0)
    critic = PatchCritic((64, 64), 4, stages)
    critic.network = torch.nn.Sequential(*(m for m in critic.network if not isinstance(m, torch.nn.GroupNorm)))
    x = torch.rand(1, 64 * 64, requires_grad=True)
    places = critic(torch.rand(1, 64 * 64), x).unflatten(1, (64 >> stages, -1))
    (gradient,) = torch.autograd.grad(places[0, 32 >> stages, 32 >> stages], x)
    seen = gradient.reshape(64, 64).abs().sum(0).nonzero()
    assert int(seen.max() - seen.min()) + 1 == {1: 8, 2: 18}[stages]


def test_losses_by_hand_and_who_moves():
    torch.manual_seed(0)
    model = model_for()
    objective = objective_for(model)
    critic = objective.players["critic"].module
    engine = make_engine(TrainingSettings(batch_size=6))
    engine.attach(objective)
    x = torch.rand(6, 8, 8)
    y = model.mixture.reconstruct(x)
    assert objective.turns(0) == ("critic", "model")

    def state():
        modules = {"critic": critic, "model": model}
        return {f"{name}.{key}": v.clone() for name, m in modules.items() for key, v in m.state_dict().items()}

    def probability(image):
        return critic(y, image).sigmoid()

    for player in ("critic", "model"):
        fake = model(y)
        expected = -(probability(x.flatten(1)).log().mean() + (1 - probability(fake)).log().mean()) / 2
        if player == "model":
            expected = -probability(fake).log().mean() + 10 * F.l1_loss(2 * fake - 1, 2 * x.flatten(1) - 1)
        before = state()
        engine.set_turn(player)
        loss, scalars = objective.loss(player, {"x": x})
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        engine.step(player, loss, 0.1)
        moved = [key for key, value in state().items() if not torch.equal(value, before[key])]
        assert moved
        assert all(key.startswith("critic." if player == "critic" else "model.network") for key in moved)
    assert set(scalars) == {"adversarial", "l1"}
    assert model.state_dict().keys() <= trained_tensors(engine.state()).keys()


def test_details_are_learnt(digits_pack):
    """The L1 distance to real digits shrinks by a third in a few steps."""
    torch.manual_seed(0)
    model = model_for((8, 8, 1))
    settings = TrainingSettings(steps=60, batch_size=64, dequantise=False, log_every=10)
    stream = ShardStream(digits_pack, "train", batch_size=64, seed=0)
    adam = OptimiserSettings(learning_rate=2e-3, beta1=0.5)
    objective = ImageTranslation(make_player(model, adam, 60), make_player(PatchCritic((8, 8, 1), 4, 1), adam, 60), 100)
    engine = make_engine(settings)
    engine.attach(objective)
    seen = []
    train(objective, engine, stream, settings, callbacks=Callbacks(on_log=lambda e: seen.append(e.metrics["l1"])))
    assert seen[-1] < seen[0] * 2 / 3


def trained(shards, engine, rank=0, size=1):
    torch.manual_seed(rank)
    settings = TrainingSettings(
        steps=4,
        batch_size=24,
        lanes=2,
        dequantise=False,
        engine="ddp" if engine == "ddp" else "deepspeed",
        zero_stage=0 if engine == "ddp" else 2,
    )
    stream = ShardStream(load_manifest(shards), "train", batch_size=24, seed=0, rank=rank, world_size=size, lanes=2)
    objective = objective_for(model_for((8, 8, 1)), steps=4)
    made = make_engine(settings)
    made.attach(objective)
    return train(objective, made, stream, settings)


def on_rank(rank, shards):
    return {engine: trained(shards, engine, rank, 2) for engine in ("ddp", "zero-2")}


def test_two_workers_equal_one(digits_pack, tmp_path):
    import test_pix2pix  # by its plain name, so that spawned processes find the function

    alone = trained(digits_pack.base, "ddp")
    first, second = run_ranks(test_pix2pix.on_rank, 2, tmp_path, digits_pack.base)
    for other in (first["ddp"], first["zero-2"], second["ddp"]):
        assert max((alone[key] - other[key]).abs().max().item() for key in alone) < 1e-5


def test_a_recipe_takes_its_mixture_from_a_folder(tmp_path, manifest_for):
    manifest = manifest_for((28, 28, 1), levels=256)
    folder = str(tmp_path / "run" / "model")
    save_model(folder, random_mfa(3, 784, 2, dtype=torch.float32), "mfa", manifest, dequantised=True)
    recipe = load_recipe("mfa-pix2pix-mnist", [f"model.mixture={tmp_path / 'run'}"])
    settle_mixture(recipe, str(tmp_path / "job"), "")
    assert recipe.model.mixture == folder
    recipe.model.check(manifest, recipe.initialisation)
    model = recipe.model.build(manifest)
    assert torch.equal(model.mixture.means, load_model(folder)[0].means)
    assert recipe.model.objective(model, manifest, recipe.training).turns(0) == ("critic", "model")
    for other, words in ((manifest_for((32, 32, 1), levels=17), "same data"), (manifest_for((784,)), "no images")):
        with pytest.raises(UserError, match=words):
            recipe.model.check(other, recipe.initialisation)
    save_model(str(tmp_path / "p"), model, "pix2pix", manifest, dequantised=False)
    recipe.model.mixture = str(tmp_path / "p")
    with pytest.raises(UserError, match="mixture"):
        settle_mixture(recipe, str(tmp_path / "job"), "")
    recipe.model.mixture = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="no model there"):
        settle_mixture(recipe, str(tmp_path / "job"), "")


def test_a_mixture_of_the_registry_is_copied_once(tmp_path, manifest_for, monkeypatch):
    """A job that goes on does so with the version that it began with."""
    from cluster import models

    opened, asked = models.open_mixture, []
    registry = tmp_path / "registry"
    save_model(
        str(registry), random_mfa(2, 784, 1, dtype=torch.float32), "mfa", manifest_for((28, 28, 1)), dequantised=False
    )

    def open_mixture(place, tracking_uri=None):
        asked.append(place)
        return opened(str(registry) if place.startswith("models:") else place)

    monkeypatch.setattr(models, "open_mixture", open_mixture)
    for _ in range(2):
        recipe = load_recipe("mfa-pix2pix-mnist", ["model.mixture=models:/mnist-mfa@champion"])
        settle_mixture(recipe, str(tmp_path / "job"), "sqlite:///none.db")
        assert recipe.model.mixture == str(tmp_path / "job" / "mixture")
    assert asked.count("models:/mnist-mfa@champion") == 1
    assert load_model(recipe.model.mixture)[0].n_components == 2
