"""Generators and critics: the contract of implicit models, shapes, and critics that do not mix."""

import numpy as np
import pytest
import torch

from cluster.recipe import load_recipe
from data.errors import UserError
from data.shards import pack
from data.sources import open_source
from trainer.checkpoint import load_model, save_model
from trainer.families.gan import GANSettings
from trainer.models.gan import Critic, Generator
from trainer.settings import InitialisationSettings, TrainingSettings

# MNIST's, CIFAR's and CelebA's sizes, small and wide images, odd sides (a vector), vectors, one feature
SHAPES = [(28, 28), (32, 32, 3), (64, 64, 3), (8, 24, 1), (9, 40, 3), (20,), (1,)]


def generator_for(shape, **options):
    torch.manual_seed(0)
    return Generator(shape, n_latent=5, n_hidden=12, width=4, **options)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_contract(shape, bounded, tmp_path, manifest_for):
    model = generator_for(shape, bounded=bounded)
    model.set_scale(torch.rand(50, *shape, generator=torch.Generator().manual_seed(1)) * 3 + 7)
    x = model.sample(6, torch.Generator().manual_seed(2))
    assert x.shape == (6, model.n_features)
    assert torch.equal(x, model.sample(6, torch.Generator().manual_seed(2)))
    assert not hasattr(model, "log_prob")
    assert not bounded or (x.min() >= 0 and x.max() <= 1)
    assert bounded or 5 < x.mean() < 12
    torch.manual_seed(3)
    log_prob, log_prior, samples, components = model(None, 6)
    assert log_prob is None
    assert log_prior.item() == 0
    assert components.tolist() == [0] * 6
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(model.decode(z)[2:3], model.decode(z[2:3]), atol=1e-5)  # no sample depends on the others
    samples.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    save_model(str(tmp_path), model, "gan", manifest_for(shape), dequantised=False)
    again, _ = load_model(str(tmp_path))
    assert torch.equal(
        again.sample(3, torch.Generator().manual_seed(5)), model.sample(3, torch.Generator().manual_seed(5))
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_critics(shape):
    torch.manual_seed(0)
    critic = Critic(shape, n_critics=3, n_hidden=7, n_layers=2, n_shared=1, width=4)
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1))
    values = critic(x)
    assert values.shape == (5, 3)
    assert torch.allclose(critic(x.flatten(1)), values)
    assert torch.allclose(critic(x[1:2]), values[1:2], atol=1e-5)
    (values[:, 1].sum()).backward()
    for layer in critic.heads:  # what is shared learns from each critic, what is not from its own
        assert layer.weight.grad[1].abs().sum() > 0
        assert layer.weight.grad[[0, 2]].abs().sum() == 0
    assert Critic(**critic.config)(x).shape == values.shape
    with pytest.raises(ValueError, match="features"):
        critic(torch.zeros(2, critic.n_features + 1))


def test_batched_critics_are_separate_perceptrons():
    torch.manual_seed(0)
    critic, x = Critic((4,), n_critics=3, n_hidden=6, n_layers=2), torch.randn(9, 4)
    for number in range(3):
        h = x
        for place, layer in enumerate(critic.heads):
            h = (h.relu() if place else h) @ layer.weight[number] + layer.bias[number]
        assert torch.allclose(critic(x)[:, number], h[:, 0], atol=1e-6)


def test_critics_see_images_as_images():
    torch.manual_seed(0)
    critic, x = Critic((8, 8, 2), width=4), torch.rand(1, 8, 8, 2)
    seen = []
    critic.trunk[0].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    critic(x)
    assert torch.equal(seen[0], x.permute(0, 3, 1, 2))
    body = []
    model = generator_for((8, 8, 2))
    model.body.register_forward_hook(lambda module, inputs, out: body.append(out))
    assert torch.equal(model.sample(1).reshape(1, 8, 8, 2), body[0].permute(0, 2, 3, 1))


@pytest.mark.parametrize("arguments", [((),), ((4,), 0), ((0, 3),), ((4,), 3, 0), ((4,), 3, 8, -1)])
def test_sizes_that_make_no_network(arguments):
    with pytest.raises(ValueError, match="needs a shape"):
        Generator(*arguments)
    with pytest.raises(ValueError, match="needs a shape"):
        Critic(*arguments)


def test_a_generator_starts_on_the_scale_of_the_data(tmp_path, array_file):
    x = np.random.default_rng(0).normal([3, -200], [0.01, 50], (500, 2)).astype(np.float32)
    manifest = pack(open_source(f"array:{array_file(x)}"), str(tmp_path / "pack"))
    family = GANSettings.model_validate({"adversarial": {"gradient_penalty": 10}})
    torch.manual_seed(0)
    model = family.build(manifest)
    family.initialise(model, manifest, TrainingSettings(dequantise=False), InitialisationSettings())
    assert torch.allclose(model.offset, torch.from_numpy(x.mean(0)), rtol=0.05)
    objective = family.objective(model, manifest, TrainingSettings(dequantise=False))
    assert torch.equal(objective.players["critic"].module.scale, model.scale)


BASE = ["model={family: gan, adversarial: {gradient_penalty: 10}}", "hierarchy=null", "training.dequantise=false"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["training.batch_size=256"], ["batch_size (256)", "5 turns", "multiple of 10"]),
        (["training.lanes=4", "training.batch_size=250"], ["4 lanes", "multiple of 20"]),
        (["training.engine=deepspeed", "training.zero_stage=3"], ["zero_stage=3", "gradient_penalty", "twice"]),
        (
            [
                *("training.engine=deepspeed", "training.zero_stage=3", "model.adversarial.gradient_penalty=null"),
                "model.adversarial.critic.weight_clip=0.01",
            ],
            ["zero_stage=3", "in parts"],
        ),
        (["model.adversarial.critic.weight_clip=0.01"], ["gradient_penalty or critic.weight_clip, not both"]),
        (["model.adversarial.gradient_penalty=null"], ["must be bounded", "weight_clip"]),
        (["model.adversarial.real_penalty=1"], ["real_penalty is of one critic", "leave gradient_penalty"]),
        (
            [
                *("training.engine=deepspeed", "training.zero_stage=3", "model.adversarial.gradient_penalty=null"),
                *("model.adversarial.real_penalty=1", "model.adversarial.loss=non-saturating"),
            ],
            ["zero_stage=3", "real_penalty", "twice"],
        ),
        (["model.adversarial.likelihood_weight=1"], ["for densities", "leave them out"]),
        (["model.adversarial.critic.n_shared=9"], ["n_shared (9)", "n_layers (4)"]),
        (["model.transport={}"], ["give one of them"]),
        (["model.adversarial=null"], ["give one of them"]),
        (["model.adversarial=null", "model.transport={embedding: 4}"], ["without bound", "weight_clip"]),
        (["model.adversarial.penalty=10"], ["unknown field", "fields there", "gradient_penalty"]),
        (["training.dequantise=true"], ["for densities", "set it to false"]),
    ],
)
def test_recipes_that_cannot_work_are_refused_when_read(overrides, parts):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", [*BASE, "training.batch_size=250", "initialisation={}", *overrides])
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value
