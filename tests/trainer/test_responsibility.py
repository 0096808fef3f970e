"""Responsibility learning: losses by hand, who moves in which turn, and workers that agree."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from latent_mixtures import LETTER, WORKING, model_for, objective_for
from torch import nn

from cluster.recipe import load_recipe
from data.errors import UserError
from data.manifest import load_manifest
from data.stream import ShardStream
from trainer import loop
from trainer.engines import make_engine
from trainer.loop import Callbacks, train
from trainer.objectives.responsibility import (
    ResponsibilityLearning,
    adversarial_loss,
    affine_images,
    invariance_loss,
    mutual_information,
)
from trainer.settings import OptimiserSettings, TrainingSettings


def test_equation_6_by_hand():
    """D(x) = 0.8 and 0.5; D(x̂) as below; M = K = 2."""
    logit = lambda p: torch.tensor(p).logit()  # noqa: E731
    weights = torch.tensor([[0.9, 0.1], [0.25, 0.75]])
    expected = (
        0.9 * (math.log(0.8) + math.log(1 - 0.3))
        + 0.1 * (math.log(0.8) + math.log(1 - 0.6))
        + 0.25 * (math.log(0.5) + math.log(1 - 0.2))
        + 0.75 * (math.log(0.5) + math.log(1 - 0.5))
    ) / (2 * 2)
    found = adversarial_loss(logit([[0.8], [0.5]]), logit([[0.3, 0.6], [0.2, 0.5]]), weights, 2)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_mutual_information_by_hand():
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]], dtype=torch.float64)
    expected = (
        0.4 * math.log(0.4 / (0.5 * 0.6))
        + 0.1 * math.log(0.1 / (0.5 * 0.4))
        + 0.2 * math.log(0.2 / (0.5 * 0.6))
        + 0.3 * math.log(0.3 / (0.5 * 0.4))
    )
    assert mutual_information(joint).item() == pytest.approx(expected, rel=1e-12)
    assert mutual_information(torch.eye(3) / 3).item() == pytest.approx(math.log(3), rel=1e-6)
    assert mutual_information(torch.outer(joint.sum(1), joint.sum(0))).item() == pytest.approx(0, abs=1e-12)
    empty = torch.zeros(2, 2).requires_grad_()
    mutual_information(empty + torch.tensor([[1.0, 0], [0, 0]])).backward()
    assert torch.isfinite(empty.grad).all()


def test_invariance_by_hand():
    """Assignments (0.9, 0.1) and (0.4, 0.6), of the other view (0.8, 0.2) and (0.5, 0.5)."""
    p, other = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).double(), torch.tensor([[0.8, 0.2], [0.5, 0.5]]).double()
    divergence = sum(a * math.log(a / b) for a, b in zip(p.flatten().tolist(), other.flatten().tolist())) / 2
    uncertainty = -sum(a * math.log(a) for a in p.flatten().tolist()) / 2
    spread = -(0.65 * math.log(0.65) + 0.35 * math.log(0.35))
    expected = divergence + 0.1 * (uncertainty - 4 * spread)
    logits = (p.log() + 3).requires_grad_()
    others = (other.log() - 1).requires_grad_()
    found = invariance_loss(logits, others)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    found.backward()
    # p is constant in the divergence: of its logits only certainty and balance move.
    twin = logits.detach().clone().requires_grad_()
    q = twin.softmax(1)
    (0.1 * (torch.special.entr(q).sum(1).mean() - 4 * torch.special.entr(q.mean(0)).sum())).backward()
    assert torch.allclose(logits.grad, twin.grad)
    assert torch.allclose(others.grad, (other - p) / 2)
    certain = torch.tensor([[400.0, 0.0], [400.0, 0.0]], requires_grad=True)
    invariance_loss(certain, certain).backward()
    assert torch.isfinite(certain.grad).all()


class Fixed(ResponsibilityLearning):
    """Noise of a seed of its own, so that a test can draw it again."""

    def _noise(self, n, n_components, n_latent):
        return torch.randn(n, n_components, n_latent, generator=torch.Generator().manual_seed(7))


def all_losses(model, discriminator, x, share=0.0):
    """The losses of the letter, written out; one graph through everything."""
    k, d = model.prior.means.shape
    noise = torch.randn(len(x), k, d, generator=torch.Generator().manual_seed(7))
    deviations = model.prior.log_deviations.exp()
    z = model.prior.means + deviations * noise
    normal = torch.distributions.Normal(model.prior.means, deviations)
    posterior = normal.log_prob(z.unsqueeze(2)).sum(-1).softmax(2)  # [M, K of the draw, K]
    fake = torch.stack([model.decode(z[:, j]) for j in range(k)], 1)

    def judged(y, j):
        values = discriminator(model.encoder(y))
        return values[:, 0] if values.shape[1] == 1 else values[:, 0] + values[:, 1 + j]

    w = (1 - share) * model.responsibilities(x) + share / k
    of_x = torch.stack([judged(x, j) for j in range(k)], 1)
    of_fake = torch.stack([judged(fake[:, j], j) for j in range(k)], 1)
    ours = torch.stack([model.responsibilities(fake[:, j]) for j in range(k)], 1)

    def information(joint):
        product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return (joint * (joint / product).log()).sum()

    m = len(x)
    bracket = of_x.sigmoid().log() + (1 - of_fake.sigmoid()).log()
    return {
        "bracket": bracket,
        "weights": w,
        "adversarial": (w * bracket).sum() / (m * k),
        "agreement": information(torch.einsum("ia,ijb->ab", model.responsibilities(x), ours) / (m * k)),
        "consistency": information(torch.einsum("ija,ijb->ab", posterior, ours) / (m * k)),
        "labels": -ours.diagonal(dim1=1, dim2=2).log().mean(),
        "non-saturating": -(w.detach() * of_fake.sigmoid().log()).sum() / (m * k),
    }


def gradients(value, module):
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), found)]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("options", [LETTER, {**WORKING, "pairs": "independent", "classifier_adversarial": True}])
def test_every_turn_has_the_gradient_of_its_own_loss(shared, options, heads):
    """At rates of zero nobody moves: each turn's gradient is that of the losses written out, at one point."""
    torch.manual_seed(1)
    model = model_for(shared=shared)
    objective = objective_for(model, Fixed, heads=heads, **options)
    engine = make_engine(TrainingSettings(batch_size=5))
    engine.attach(objective)
    x = torch.rand(5, 64)
    seen = []
    for player in objective.turns(0):
        engine.set_turn(player)
        value, _ = objective.loss(player, {"x": x})
        engine.step(player, value, 0.0)
        seen.append((player, value.item(), [p.grad.clone() for p in objective.players[player].module.parameters()]))
    for player in objective.players.values():
        player.module.requires_grad_(True)
    discriminator = objective.players["discriminator"].module
    all_of = all_losses(model, discriminator, x, options.get("uniform_share", 0.0))
    k = 3
    for_d = -(all_of["weights"].detach() * all_of["bracket"]).sum() / (5 * k)
    if options:
        at = x.clone().requires_grad_()
        values = discriminator(model.encoder(at))
        if heads > 1:
            values = all_of["weights"].detach() * (values[:, :1] + values[:, 1:])
        (slope,) = torch.autograd.grad(values.sum(), at, create_graph=True)
        for_d = for_d + options["real_penalty"] / 2 * slope.square().sum() / (5 * k)
    for_c = (all_of["weights"] * all_of["bracket"].detach()).sum() / (5 * k)
    for_both = -all_of["consistency"] + (all_of["labels"] if options else 0)
    for_g = all_of["adversarial"]
    if options:
        for_g = all_of["non-saturating"] + options["generator_consistency"] * for_both
    encoder = ["encoder"] if shared else []
    expected = [
        *((player, for_d) for player in [*encoder, "discriminator"]),
        ("model", for_g),
        *((player, for_c) for player in [*encoder, "classifier"]),
        *((player, -all_of["agreement"]) for player in [*encoder, "classifier"]),
        ("prior", for_both),
        *((player, options.get("classifier_consistency", 1) * for_both) for player in [*encoder, "classifier"]),
    ]
    assert [player for player, _, _ in seen] == [player for player, _ in expected]
    for (player, value, found), (_, loss) in zip(seen, expected):
        if player != "model" or options:  # the generator's part of eq. 6 leaves the real images out
            assert value == pytest.approx(loss.item(), rel=1e-4, abs=1e-6), player
        for ours, theirs in zip(found, gradients(loss, objective.players[player].module), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6), player


class OneNoise(ResponsibilityLearning):
    """One ε for all images of a sample, and draws that a test chooses."""

    chosen: tuple[int, ...] = ()

    def _noise(self, n, n_components, n_latent):
        return torch.randn(n, 1, n_latent, generator=torch.Generator().manual_seed(7)).expand(n, n_components, -1)

    def _drawn(self, responsibilities):
        return torch.tensor(self.chosen)[:, None]


@pytest.mark.parametrize("heads", [1, 4])
def test_drawn_gaussians_have_the_losses_of_all_in_expectation(heads):
    """Losses and gradients of D and G, over the nine draws of three Gaussians for two samples, by probability."""
    torch.manual_seed(1)
    model, x = model_for(), torch.rand(2, 64)
    options = {"loss": "non-saturating", "pairs": None, "uniform_share": 0.1, "classifier_adversarial": False}
    objective = objective_for(model, OneNoise, heads=heads, **options)
    players = ("discriminator", "model")
    modules = [objective.players[player].module for player in players]
    expected = [objective.loss(player, {"x": x})[0] for player in players]
    responsibilities = 0.9 * model.responsibilities(x).detach() + 0.1 / 3
    objective.generated = "drawn"
    found, total = [0.0, 0.0], 0.0
    for objective.chosen in itertools.product(range(3), repeat=2):
        p = responsibilities[[0, 1], list(objective.chosen)].prod().item()
        total += p
        for i, player in enumerate(players):
            found[i] = found[i] + p * objective.loss(player, {"x": x})[0]
    assert total == pytest.approx(1, abs=1e-6)
    for ours, theirs, module in zip(found, expected, modules):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        for a, b in zip(gradients(ours, module), gradients(theirs, module)):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_consistency_is_of_the_drawn_gaussians():
    torch.manual_seed(1)
    model, x = model_for(), torch.rand(4, 64)
    options = {"pairs": None, "classifier_adversarial": False, "generated": "drawn", "label_steps": 5}
    objective = objective_for(model, OneNoise, **options)
    objective.chosen = (2, 0, 2, 1)
    chosen = torch.tensor(objective.chosen)
    objective.turns(0)
    for player in ("discriminator", "model"):
        objective.loss(player, {"x": x})
    value, _ = objective.loss("prior", {"x": x})
    noise = torch.randn(4, 1, model.n_latent, generator=torch.Generator().manual_seed(7))[:, 0]
    z = model.prior.place(noise, chosen)
    assigned = model.responsibilities(model.decode(z))
    joint = model.prior.log_posterior(z).exp().T @ assigned / 4
    expected = -mutual_information(joint) - assigned[range(4), chosen].log().mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients(value, model.prior), gradients(expected, model.prior)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_what_is_not_finite_is_told_by_the_loss():
    """On all workers alike, and not by the draw on one."""
    model = model_for()
    objective = objective_for(model, pairs="augmented", classifier_adversarial=False, generated="drawn")
    with torch.no_grad():
        next(model.classifier.parameters()).fill_(torch.nan)
    for player in objective.turns(0)[:2]:
        assert torch.isnan(objective.loss(player, {"x": torch.rand(4, 64)})[0])


def test_draws_follow_the_responsibilities():
    """False-alarm odds below 1e-6: five standard deviations."""
    torch.manual_seed(0)
    objective = objective_for(model_for(), classifier_adversarial=False, generated="drawn")
    p = torch.tensor([0.7, 0.1, 0.2])
    drawn = objective._drawn(p.expand(10_000, 3)).flatten().bincount(minlength=3) / 10_000
    assert ((drawn - p).abs() < 5 * (p * (1 - p) / 10_000).sqrt()).all()


@pytest.mark.parametrize("shared", [False, True])
def test_each_turn_moves_its_player_and_nobody_else(shared):
    torch.manual_seed(0)
    model = model_for(shared=shared)
    objective = objective_for(model)
    engine = make_engine(TrainingSettings(batch_size=8))
    engine.attach(objective)
    modules = {name: player.module for name, player in objective.players.items()}

    def state():
        return {f"{name}.{key}": v.clone() for name, m in modules.items() for key, v in m.state_dict().items()}

    x, order = torch.rand(8, 8, 8), objective.turns(0)
    e = ["encoder"] if shared else []
    assert order == [
        *(*e, "discriminator", "model", *e, "classifier", *e, "classifier", "prior", *e, "classifier"),
    ]
    for player in order:
        before = state()
        engine.set_turn(player)
        engine.step(player, objective.loss(player, {"x": x})[0], 0.1)
        moved = {key.partition(".")[0] for key, value in state().items() if not torch.equal(value, before[key])}
        assert moved == {player}
    assert objective._plan == []


def test_a_shared_encoder_and_its_head_move_as_one():
    """Both gradients of eq. 6 are of the point before the encoder's move."""
    torch.manual_seed(0)
    model = model_for(shared=True)
    objective = objective_for(model, Fixed)
    head = objective.players["discriminator"].module
    x = torch.rand(6, 64)
    all_of = all_losses(model, head, x)
    expected = gradients(-(all_of["weights"].detach() * all_of["bracket"]).sum() / 18, head)
    engine = make_engine(TrainingSettings(batch_size=6))
    engine.attach(objective)
    objective.turns(0)
    for player in ("encoder", "discriminator"):
        engine.set_turn(player)
        engine.step(player, objective.loss(player, {"x": x})[0], 1.0)
    for ours, theirs in zip(head.parameters(), expected):
        assert torch.allclose(ours.grad, theirs, rtol=1e-3, atol=1e-6)


def test_pairs_of_equation_5():
    torch.manual_seed(0)
    model, x = model_for(), torch.rand(5, 64)
    assert torch.allclose(affine_images(x, (8, 8), torch.full((5, 6), 0.5)), x, atol=1e-5)
    nearest = objective_for(model, Fixed, pairs="nearest")
    others = nearest._others(x)
    fake = nearest._kept["fake"]
    best = torch.cdist(x, fake).argmin(1)
    assert torch.equal(others, fake[best])
    augmented = objective_for(model, pairs="augmented")._others(x)
    assert augmented.shape == x.shape
    assert 0.01 < (augmented - x).abs().mean() < 0.3
    vectors = model_for((3,))
    jittered = objective_for(vectors, pairs="augmented")._others(x[:, :3])
    assert 0 < (jittered - x[:, :3]).abs().max() < 1
    without = objective_for(model, pairs=None, classifier_adversarial=False)
    assert without.turns(0) == ["discriminator", "model", "prior", "classifier"]
    unled = objective_for(model, pairs=None, classifier_adversarial=False, classifier_consistency=0)
    assert unled.turns(0) == ["discriminator", "model", "prior"]


def test_labels_are_taught_in_the_first_steps_alone():
    torch.manual_seed(0)
    objective = objective_for(model_for(), Fixed, label_steps=2)
    logits, x = torch.randn(12, 3), torch.rand(4, 64)
    values = []
    for step in range(4):
        objective.turns(step)
        values.append(objective._consistency_loss(torch.zeros(12, 3).log_softmax(1), logits, x)[0].item())
    by_hand = F.cross_entropy(logits, torch.tensor([0, 1, 2] * 4)).item()
    assert values == pytest.approx([by_hand, by_hand, 0, 0], abs=1e-6)


# Two workers: the noise of all is drawn everywhere, and each takes its rows.
WORLD = {"rank": 0, "size": 1}
STEPS, BATCH = 4, 24
# Adam would make much of rounding where a gradient is all but zero, such as that of eq. 5 at the start.
MOMENTUM = OptimiserSettings(name="sgd", learning_rate=0.2, beta1=0.5)
RUNS = {
    "letter": ({}, False),
    "letter, shared": ({}, True),
    "working": (WORKING, False),
    "working, shared": (WORKING, True),
    "invariance": ({**WORKING, "agreement": "invariance"}, False),
    "drawn": ({**WORKING, "agreement": "invariance", "generated": "drawn"}, False),
    "invariance, shared": ({**WORKING, "agreement": "invariance"}, True),
    "each": ({**WORKING, "agreement": "invariance", "generated": "drawn", "heads": 4}, False),
}


class Shared(ResponsibilityLearning):
    def _noise(self, n, n_components, n_latent):
        rows = torch.randn(n * WORLD["size"], n_components, n_latent)
        return rows[WORLD["rank"] * n :][:n]

    def _drawn(self, responsibilities):
        n = len(responsibilities)
        at = torch.rand(n * WORLD["size"], 1)[WORLD["rank"] * n :][:n]
        return (responsibilities.cumsum(1)[:, :-1] < at).sum(1, keepdim=True)

    def _augmented(self, x):
        draws = torch.rand(len(x) * WORLD["size"], 6)
        return affine_images(x, (8, 8), draws[WORLD["rank"] * len(x) :][: len(x)])


def trained(shards, name, engine, rank=0, size=1):
    WORLD.update(rank=rank, size=size)
    loop._mix = lambda seed, step, rank: 1000 * seed + step
    options, shared = RUNS[name]
    torch.manual_seed(rank)  # the engine gives all ranks rank 0's start
    objective = objective_for(model_for((8, 8, 1), shared=shared), Shared, MOMENTUM, STEPS, **options)
    kind, stage = ("ddp", 0) if engine == "ddp" else ("deepspeed", int(engine[-1]))
    settings = TrainingSettings(
        steps=STEPS, batch_size=BATCH, lanes=2, dequantise=False, engine=kind, zero_stage=stage, checkpoint_every=2
    )
    stream = ShardStream(load_manifest(shards), "train", batch_size=BATCH, seed=0, rank=rank, world_size=size, lanes=2)
    made = make_engine(settings)
    made.attach(objective)
    saved = {}
    final = train(objective, made, stream, settings, callbacks=Callbacks(on_checkpoint=saved.__setitem__))
    return final, saved[2]


def resumed(shards, name, engine, rank, size, start):
    WORLD.update(rank=rank, size=size)
    options, shared = RUNS[name]
    objective = objective_for(model_for((8, 8, 1), shared=shared), Shared, MOMENTUM, STEPS, **options)
    settings = TrainingSettings(
        steps=STEPS, batch_size=BATCH, lanes=2, dequantise=False, engine="deepspeed", zero_stage=int(engine[-1])
    )
    stream = ShardStream(load_manifest(shards), "train", batch_size=BATCH, seed=0, rank=rank, world_size=size, lanes=2)
    made = make_engine(settings)
    made.attach(objective)
    return train(objective, made, stream, settings, resume=(2, start))


def on_rank(rank, shards):
    out = {}
    for name in RUNS:
        out[f"{name}/ddp"], saved = trained(shards, name, "ddp", rank, 2)
        if name == "working, shared":
            out[f"{name}/zero-2"], _ = trained(shards, name, "zero-2", rank, 2)
            out[f"{name}/zero-2 resumed"] = resumed(shards, name, "zero-2", rank, 2, saved)
    return out


@pytest.fixture(scope="module")
def by_rank(digits_pack, tmp_path_factory):
    import test_responsibility  # by its plain name, so that spawned processes find the function

    return run_ranks(test_responsibility.on_rank, 2, tmp_path_factory.mktemp("ranks"), digits_pack.base)


def difference(a, b):
    assert a.keys() == b.keys()
    pairs = [(a[name].double(), b[name].double()) for name in a]
    return max(((x - y).abs().max() / x.abs().max().clamp_min(1)).item() for x, y in pairs)


@pytest.mark.parametrize("name", RUNS)
def test_two_workers_equal_one(by_rank, digits_pack, monkeypatch, name):
    """The mutual information is of both workers' images: of each one's own it would be another number."""
    monkeypatch.setattr(loop, "_mix", loop._mix)  # restored when the test ends
    alone, _ = trained(digits_pack.base, name, "ddp")
    assert difference(alone, by_rank[0][f"{name}/ddp"]) < 1e-6
    assert difference(by_rank[1][f"{name}/ddp"], by_rank[0][f"{name}/ddp"]) == 0


@pytest.mark.parametrize("run", ["zero-2", "zero-2 resumed"])
def test_deepspeed_equals_ddp(by_rank, run):
    assert difference(by_rank[0]["working, shared/ddp"], by_rank[0][f"working, shared/{run}"]) < 1e-5


def test_shares_are_those_of_the_weights():
    """They move once in a step, towards the mean responsibilities, and samples are drawn by them."""
    torch.manual_seed(0)
    model, x = model_for(), torch.rand(6, 64)
    objective = objective_for(model, pairs=None, classifier_adversarial=False, uniform_share=0.4)
    engine = make_engine(TrainingSettings(batch_size=6))
    engine.attach(objective)
    nn.init.constant_(model.classifier.heads[0].bias, 0)
    model.classifier.heads[0].bias.data[0] += 3
    expected, due = torch.full((3,), 1 / 3), 0.6 * model.responsibilities(x).mean(0).detach() + 0.4 / 3
    for step in range(3):
        for player in objective.turns(step):
            engine.set_turn(player)
            engine.step(player, objective.loss(player, {"x": x})[0], 0.0)
        expected = expected.lerp(due, 1 - (1 + step) / (10 + step))
        objective.loss("prior", {"x": x})  # out of turn, as when a checkpoint is read
    assert torch.allclose(model.prior.shares, expected, atol=1e-6)
    model.prior.shares.copy_(torch.tensor([0.0, 0.75, 0.25]))
    component, _ = model._draw(20_000, torch.Generator().manual_seed(0))
    # Five standard deviations: a false alarm in 2 of a million seeds, and the seed is fixed.
    assert abs((component == 1).double().mean().item() - 0.75) < 5 * (0.75 * 0.25 / 20_000) ** 0.5
    assert not (component == 0).any()


def test_a_trained_model_is_whole():
    """Every tensor of the model is in the training's state, by its name in the model."""
    from trainer.fit import trained_tensors

    for shared in (False, True):
        model = model_for(shared=shared)
        engine = make_engine(TrainingSettings(batch_size=8))
        engine.attach(objective_for(model))
        assert model.state_dict().keys() <= trained_tensors(engine.state()).keys()


def test_drawn_gaussians_leave_no_weights_to_learn_by():
    with pytest.raises(UserError, match="classifier_adversarial=false"):
        load_recipe("mnist-responsibility", ["model.generated=drawn", "model.classifier_adversarial=true"])
    independent = ["model.generated=drawn", "model.pairs=independent", "model.agreement=information"]
    with pytest.raises(UserError, match="set augmented, nearest or null"):
        load_recipe("mnist-responsibility", independent)


def test_invariance_needs_pairs_that_belong_together():
    with pytest.raises(UserError, match="set model.pairs=augmented"):
        load_recipe("mnist-responsibility", ["model.agreement=invariance", "model.pairs=nearest"])


def test_a_shared_encoder_has_layers_and_one_average(manifest_for):
    shared = ["model.encoder.shared=true"]
    with pytest.raises(UserError, match="same average for both"):
        load_recipe("mnist-responsibility", [*shared, "model.encoder.classifier.average=0.9"])
    recipe = load_recipe("mnist-responsibility", [*shared, "model.encoder.n_layers=0"])
    recipe.model.check(manifest_for((8, 8)), recipe.initialisation)
    with pytest.raises(UserError, match="raise it"):
        recipe.model.check(manifest_for((3,)), recipe.initialisation)


@pytest.mark.parametrize("name", ["responsibility", "responsibility-letter", "deligan", "latent-mixture"])
def test_recipes_are_read(name, manifest_for):
    recipe = load_recipe(f"mnist-{name}", [])
    model = recipe.model.build(manifest_for((28, 28, 1), levels=256))
    assert type(model)(**model.config).sample(2).shape == (2, 784)
    objective = recipe.model.objective(model, manifest_for((28, 28, 1), levels=256), recipe.training)
    assert "model" in objective.turns(0)
    if name.startswith("responsibility"):
        with pytest.raises(UserError, match="zero_stage=3"):
            load_recipe(f"mnist-{name}", ["training.engine=deepspeed", "training.zero_stage=3"])
        with pytest.raises(UserError, match="multiple of 2"):
            load_recipe(f"mnist-{name}", ["training.batch_size=31"])
