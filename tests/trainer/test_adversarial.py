"""Adversarial losses against hand-computed cases, the gradient penalty against finite differences, and turns."""

import pytest
import torch
from densities import GaussianMixture
from torch import nn

from data.shards import pack
from data.sources import open_source
from trainer.engines import DDPEngine
from trainer.families.flow import FlowSettings
from trainer.fit import Fit, trained_tensors
from trainer.loop import Callbacks
from trainer.models.gan import Critic, Generator
from trainer.objectives.adversarial import (
    Adversarial,
    CriticWeights,
    critic_weights,
    gradient_penalty,
    mini_batch,
    real_penalty,
)
from trainer.objectives.likelihood import MaximumLikelihood
from trainer.players import make_player
from trainer.settings import InitialisationSettings, OptimiserSettings, TrainingSettings


class Linear(nn.Module):
    """f_c(x) = w_c · x."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x @ self.weights.T


def player(module, **options):
    return make_player(module, OptimiserSettings(learning_rate=1e-2, **options), 100)


def objective_for(critic, model=None, **options):
    generator = player(model or GaussianMixture(2, 2, spread=3.0))
    return Adversarial(generator, player(critic), likelihood=MaximumLikelihood(generator, 50), **options)


def drawn(model, n, seed):
    torch.manual_seed(seed)
    return model(None, n)[2:]


REAL = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


@pytest.mark.parametrize("kind", ["non-saturating", "minimax", "wasserstein"])
def test_losses_equal_their_formulas(kind):
    objective = objective_for(Linear([[1.0, -2.0]]), loss=kind, critic_steps=1)
    fake, _ = drawn(objective.players["model"].module, 3, seed=5)

    def f(x):
        return (x[:, 0] - 2 * x[:, 1]).double()

    def d(x):
        return 1 / (1 + (-f(x)).exp())

    expected = {
        "non-saturating": (-(d(REAL).log() + (1 - d(fake)).log()).mean(), -d(fake).log().mean()),
        "minimax": (-(d(REAL).log() + (1 - d(fake)).log()).mean(), (1 - d(fake)).log().mean()),
        "wasserstein": ((f(fake) - f(REAL)).mean(), -f(fake).mean()),
    }[kind]
    for name, value in zip(("critic", "model"), expected):
        torch.manual_seed(5)
        assert objective.loss(name, {"x": REAL})[0].item() == pytest.approx(value.item(), rel=1e-5)


def test_the_penalty_is_paid_between_samples_and_data():
    """Of a linear critic the gradient is its weights, wherever: λ (|w| - 1)²; x̂ is ε x + (1 - ε) G(z)."""
    options = {"critic_steps": 1, "gradient_penalty": 10.0}
    loss, scalars = objective_for(Linear([[3.0, 4.0]]), **options).loss("critic", {"x": REAL})
    assert scalars["penalty"].item() == pytest.approx(16)
    assert loss.item() == pytest.approx(160 - scalars["gap"].item(), rel=1e-6)
    seen, critic = [], Linear([[1.0, 0.0]])
    critic.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].detach()))
    objective = objective_for(critic, **options)
    objective._interpolation = lambda n: torch.tensor([[0.0], [1.0], [0.25]])
    torch.manual_seed(5)
    objective.loss("critic", {"x": REAL})
    fake, _ = drawn(objective.players["model"].module, 3, seed=5)
    assert torch.allclose(seen[1], torch.stack([fake[0], REAL[1], 0.25 * REAL[2] + 0.75 * fake[2]]))


def test_gradient_penalty_equals_finite_differences():
    """Its value, from the critic's values alone, and its gradient in the critic's parameters, from its values."""
    torch.manual_seed(0)
    critic, x = Critic((3,), n_critics=2, n_hidden=8, n_layers=2).double(), torch.randn(6, 3, dtype=torch.float64)
    weights = CriticWeights(torch.rand(6, 2, dtype=torch.float64))
    h = 1e-6

    def value(points):
        return (critic(points) * weights.values).sum(1)

    with torch.no_grad():
        slopes = [(value(x + h * e) - value(x - h * e)) / (2 * h) for e in torch.eye(3, dtype=torch.float64)]
        expected = (torch.stack(slopes, 1).norm(dim=1) - 1).square().mean()
    penalty = gradient_penalty(critic, x, weights)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    penalty.backward()
    with torch.no_grad():
        for parameter in critic.parameters():
            flat, place = parameter.view(-1), parameter.numel() // 2
            start, found = flat[place].item(), []
            for sign in (1, -1):
                flat[place] = start + sign * h
                with torch.enable_grad():
                    found.append(gradient_penalty(critic, x, weights).item())
            flat[place] = start
            gradient = 0.0 if parameter.grad is None else parameter.grad.view(-1)[place].item()
            assert gradient == pytest.approx((found[0] - found[1]) / (2 * h), rel=1e-4, abs=1e-7)


def test_the_penalty_at_the_data():
    """Of a linear critic |w|² / 2; of another the slopes of its values, and its gradient by finite differences."""
    loss, scalars = objective_for(Linear([[3.0, 4.0]]), critic_steps=1, real_penalty=10.0).loss("critic", {"x": REAL})
    assert scalars["penalty"].item() == pytest.approx(12.5)
    assert loss.item() == pytest.approx(125 - scalars["gap"].item(), rel=1e-6)
    torch.manual_seed(0)
    critic, x = Critic((3,), n_critics=1, n_hidden=8, n_layers=2).double(), torch.randn(6, 3, dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        slopes = [(critic(x + h * e) - critic(x - h * e))[:, 0] / (2 * h) for e in torch.eye(3, dtype=torch.float64)]
        expected = torch.stack(slopes, 1).square().sum(1).mean() / 2
    penalty = real_penalty(critic, x)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    penalty.backward()
    weight = next(critic.parameters())
    gradient, found = weight.grad.view(-1)[1].item(), []
    for shift in (h, -2 * h):
        with torch.no_grad():
            weight.view(-1)[1] += shift
        found.append(real_penalty(critic, x).item())
    assert gradient == pytest.approx((found[0] - found[1]) / (2 * h), rel=1e-4, abs=1e-7)


def test_the_penalty_of_a_flat_critic_has_a_gradient():
    critic = Linear([[0.0, 0.0]])
    penalty = gradient_penalty(critic, REAL)
    penalty.backward()
    assert penalty.item() == 1
    assert torch.isfinite(critic.weights.grad).all()


def test_pgan_mixes_critics_by_the_posterior_which_gets_no_gradient():
    """f(x) = Σ_c p(c | x) f_c(x) (4.13). The posterior varies with x and with the generator, yet counts as constant."""
    model = GaussianMixture(2, 2, spread=0.5)
    weights = [[1.0, 2.0], [-3.0, 0.5]]
    objective = objective_for(Linear(weights), model, assignment="posterior", critic_steps=1, temperature=8.0)
    fake, component = drawn(model, 3, seed=5)
    posterior = (model.component_log_prob(fake) / 8).softmax(1).detach()
    assert 0.05 < posterior.min() < 0.45
    torch.manual_seed(5)
    loss, _ = objective.loss("model", {"x": REAL})
    assert loss.item() == pytest.approx(-(posterior * (fake @ torch.tensor(weights).T)).sum(1).mean().item(), rel=1e-5)
    loss.backward()
    # With a constant posterior dL/dG(z_i) = -Σ_c p(c | x_i) w_c / n, and G's own mean moves with it.
    expected = torch.zeros(2, 2).index_add_(0, component, -(posterior @ torch.tensor(weights)) / 3)
    assert torch.allclose(model.means.grad, expected, atol=1e-6)
    assert model.mixing_logits.grad.abs().max() == 0
    model.zero_grad()
    objective.loss("critic", {"x": REAL})[0].backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_the_slope_of_a_mixture_of_critics_is_that_of_its_value():
    """With `posterior_slope` ∇f is the whole gradient of f(x) = Σ_c p(c | x) f_c(x): against autograd through all."""
    torch.manual_seed(0)
    model, critic = GaussianMixture(3, 2), Critic((2,), n_critics=3, n_hidden=8)
    x = torch.randn(5, 2)
    weights = critic_weights(model, x, "posterior", 2.0, sloped=True)
    whole = x.clone().requires_grad_()
    value = (critic(whole) * (model.component_log_prob(whole) / 2).softmax(1)).sum(1)
    (expected,) = torch.autograd.grad(value.sum(), whole)
    at = x.clone().requires_grad_()
    found = (critic(at) * weights.at(at)).sum(1)
    assert torch.allclose(found, value, atol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), at)
    assert torch.allclose(slope, expected, atol=1e-6)
    penalty = gradient_penalty(critic, x, weights)
    assert penalty.item() == pytest.approx(((expected.norm(dim=1) - 1) ** 2).mean().item(), rel=1e-5)
    # The penalty reaches the critics, and neither it nor a generator's step reaches the mixture through the weights.
    model.zero_grad()
    penalty.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in critic.parameters())
    part = weights.share(1, 2)
    assert (part.values.shape, part.slopes.shape) == ((2, 3), (2, 3, 2))
    assert torch.equal(part.slopes, weights.slopes[1::2])


def test_hard_assignment_takes_one_critic_each():
    model = GaussianMixture(2, 2, spread=0.5)
    objective = objective_for(Linear([[1.0, 2.0], [-3.0, 0.5]]), model, assignment="hard", critic_steps=1)
    fake, component = drawn(model, 3, seed=5)
    f = objective.players["critic"].module
    own, likeliest = f(fake)[range(3), component], f(REAL)[range(3), model.component_log_prob(REAL).argmax(1)]
    for name, value in (("critic", own.mean() - likeliest.mean()), ("model", -own.mean())):
        torch.manual_seed(5)
        assert objective.loss(name, {"x": REAL})[0].item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("assignment", ["posterior", "hard"])
def test_pgan_of_one_component_is_wgan_gp(assignment):
    torch.manual_seed(0)
    critic, model = Critic((2,), n_hidden=8, n_layers=2), GaussianMixture(1, 2)
    found = []
    for kind in ("single", assignment):
        objective = objective_for(critic, model, assignment=kind, gradient_penalty=10.0, likelihood_weight=0.3)
        critic.zero_grad()
        model.zero_grad()
        batch = {"x": torch.randn(20, 2, generator=torch.Generator().manual_seed(1))}
        losses = []
        for name in ("critic", "model"):
            torch.manual_seed(5)
            losses.append(objective.loss(name, batch)[0])
            losses[-1].backward()
        found.append([*losses, *(p.grad for p in (*critic.parameters(), *model.parameters()) if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found))


def test_likelihood_is_added_and_alone_trains_the_weights():
    """-E f(G(z)) - λ (E log p(x) + log p(θ) / N) (4.10)."""
    model = GaussianMixture(2, 2, spread=3.0)
    critic = Linear([[1.0, -2.0]])
    torch.manual_seed(5)
    both, scalars = objective_for(critic, model, critic_steps=1, likelihood_weight=0.3).loss("model", {"x": REAL})
    torch.manual_seed(5)
    alone, _ = objective_for(critic, model, critic_steps=1).loss("model", {"x": REAL})
    log_prob, log_prior = model(REAL)
    assert both.item() == pytest.approx((alone - 0.3 * (log_prob.mean() + log_prior / 50)).item(), rel=1e-5)
    assert scalars["log_likelihood"].item() == pytest.approx(log_prob.mean().item())
    (weights,) = torch.autograd.grad(both, model.mixing_logits)
    (expected,) = torch.autograd.grad(-0.3 * log_prob.mean(), model.mixing_logits)
    assert torch.allclose(weights, expected)


def test_pretraining_is_likelihood_alone():
    model = GaussianMixture(2, 2)
    objective = objective_for(Linear([[1.0, 1.0]]), model, pretrain_steps=3, critic_steps=3)
    assert [len(objective.turns(step)) for step in range(5)] == [1, 1, 1, 4, 4]
    assert objective.turns(2) == ("model",)
    log_prob, log_prior = model(REAL)
    assert objective.loss("model", {"x": REAL})[0].item() == pytest.approx((-log_prob.mean() - log_prior / 50).item())


def test_every_turn_of_the_critic_sees_new_data():
    """The shares of a batch are disjoint, and two workers' are together those of one."""
    x = torch.arange(24.0).reshape(24, 1)
    assert sorted(torch.cat([mini_batch(x, k, 3) for k in range(3)]).flatten().tolist()) == list(range(24))
    assert torch.equal(mini_batch(x, -1, 3), mini_batch(x, 2, 3))
    for k in range(3):
        halves = torch.cat([mini_batch(x[:12], k, 3), mini_batch(x[12:], k, 3)])
        assert torch.equal(halves, mini_batch(x, k, 3))
    with pytest.raises(ValueError, match="25 samples cannot be shared by 3"):
        mini_batch(torch.zeros(25, 1), 0, 3)
    seen = []
    critic = Linear([[1.0]])
    critic.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].detach().clone()))
    objective = objective_for(critic, GaussianMixture(1, 1), critic_steps=3)
    for step in range(2):  # and again from the start in the next step
        for name in objective.turns(step):
            objective.loss(name, {"x": x})
        batches = [seen.pop(0) for _ in range(4)]
        assert sorted(torch.cat([b[:8] for b in batches[:3]]).flatten().tolist()) == list(range(24))
        assert len({tuple(b[-8:].flatten().tolist()) for b in batches}) == 4  # new noise in all turns


@pytest.mark.parametrize("assignment", ["single", "posterior"])
def test_gradients_reach_only_the_player_whose_turn_it_is(assignment):
    torch.manual_seed(0)
    model, critic = GaussianMixture(3, 2), Critic((2,), n_critics=1 if assignment == "single" else 3, n_hidden=8)
    options = {"gradient_penalty": 10.0, "likelihood_weight": 0.1, "assignment": assignment}
    objective = objective_for(critic, model, **options)
    engine = DDPEngine(torch.device("cpu"))
    engine.attach(objective)
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    for name in objective.turns(0):
        engine.set_turn(name)
        before = {n: [p.detach().clone() for p in q.module.parameters()] for n, q in objective.players.items()}
        for each in objective.players.values():
            each.optimiser.zero_grad(set_to_none=True)
        engine.step(name, objective.loss(name, {"x": x})[0], 1e-2)
        for n, q in objective.players.items():
            moved = [not torch.equal(p, b) for p, b in zip(q.module.parameters(), before[n])]
            assert any(moved) == (n == name)
            assert n == name or all(p.grad is None for p in q.module.parameters())


def test_weight_clipping_follows_every_update():
    critic = Critic((2,), n_hidden=8, n_layers=2)
    settings = OptimiserSettings(name="rmsprop", learning_rate=1.0, beta1=0.0, beta2=0.99)
    clipped = make_player(critic, settings, 10, weight_clip=0.01)
    critic(torch.randn(5, 2)).sum().backward()
    clipped.optimiser.step()
    largest = [p.abs().max().item() for p in critic.parameters()]
    assert max(largest) == pytest.approx(0.01)


def test_a_perfect_critic_teaches_the_generator():
    """Wasserstein with f(x) = -|x - 3|: the generator's samples must move to 3; a sign error drives them away."""
    generator = Generator((1,), n_latent=2, n_hidden=8, n_layers=1)

    class Distance(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return -(x - 3).abs()

    objective = objective_for(Distance(), generator, critic_steps=1)
    engine = DDPEngine(torch.device("cpu"))
    engine.attach(objective)
    engine.set_turn("model")
    for step in range(60):
        torch.manual_seed(step)
        engine.step("model", objective.loss("model", {"x": torch.zeros(64, 1)})[0], 3e-2)
    assert (generator.sample(500) - 3).abs().mean() < 0.1


def test_where_a_density_has_no_support_all_critics_count_the_same():
    model = GaussianMixture(2, 2)
    objective = objective_for(Linear([[1.0, 2.0], [-3.0, 0.5]]), model, assignment="posterior", critic_steps=1)
    model.component_log_prob = lambda x: torch.full((len(x), 2), -torch.inf)
    assert torch.equal(objective._weights_at(REAL, sloped=False).values, torch.full((3, 2), 0.5))


def test_a_mixture_of_flows_trains_against_its_critics(tmp_path):
    """From a recipe's settings through the loop: what is logged, and what remains."""
    manifest = pack(open_source("ring:3,samples=900"), str(tmp_path / "ring"))
    critic = {"n_hidden": 8, "n_layers": 2, "n_shared": 1}
    adversarial = {"gradient_penalty": 0.1, "likelihood_weight": 1, "assignment": "posterior", "critic": critic}
    family = FlowSettings.model_validate(
        {"n_components": 3, "n_couplings": 2, "width": 8, "pretrain_steps": 2, "adversarial": adversarial}
    )
    assert family.label == "MixFlow (NICE, PGAN+ML), T=3"
    training = TrainingSettings(steps=6, batch_size=150, log_every=3, dequantise=False)
    torch.manual_seed(0)
    model, logged = family.build(manifest), []
    family.initialise(model, manifest, training, InitialisationSettings())
    state = Fit(model, manifest, training, objective=family.objective).run(Callbacks(on_log=logged.append))
    assert {"loss", "adversarial", "log_likelihood", "critic_loss", "critic_gap", "critic_penalty"} <= set(
        logged[-1].metrics
    )
    assert state["critic.module.heads.1.weight"].shape == (3, 8, 1)
    tensors = trained_tensors(state)
    again = family.build(manifest)
    again.load_state_dict({name: tensors[name] for name in again.state_dict()})
    assert torch.equal(again.shift, model.shift)
    with pytest.raises(ValueError, match="ZeRO-3"):
        family.check_training(training.model_copy(update={"engine": "deepspeed", "zero_stage": 3}), lanes=1)
