"""Losses of autoencoders: sliced Wasserstein against POT and explicit sorting, MMD and KL against references."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_ranks

from data.manifest import load_manifest
from data.stream import ShardStream
from trainer.engines import make_engine
from trainer.families.autoencoder import AutoencoderSettings
from trainer.loop import train
from trainer.models.autoencoder import Autoencoder, Coded
from trainer.models.classifier import Classifier
from trainer.models.gan import Critic
from trainer.models.priors import Prior
from trainer.objectives import regularisers
from trainer.objectives.autoencoding import AdversarialAutoencoding, Autoencoding, Reconstruction, feature_loss
from trainer.objectives.regularisers import (
    KullbackLeibler,
    MaximumMeanDiscrepancy,
    OverWorkers,
    SlicedWasserstein,
    imq_mmd,
    power,
    random_directions,
    sliced_wasserstein,
)
from trainer.players import make_player
from trainer.settings import OptimiserSettings, TrainingSettings


def sets(n=40, m=40, d=5, projections=30):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g, dtype=torch.float64, requires_grad=True)
    y = 2 * torch.rand(m, d, generator=g, dtype=torch.float64) - 1
    return x, y, random_directions(projections, d, g).double()


@pytest.mark.parametrize("m", [40, 120, 33, 7])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_sliced_wasserstein_equals_pot_on_the_same_directions(m, p):
    ot = pytest.importorskip("ot")
    x, y, directions = sets(m=m)
    mine = sliced_wasserstein(x, y, directions, power(p))
    theirs = ot.sliced_wasserstein_distance(x, y, p=p, projections=directions.T) ** p
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(mine, x)
    (expected,) = torch.autograd.grad(theirs, x)
    assert torch.allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("m", [40, 80, 70])
def test_gradient_equals_autograd_through_explicit_sorting(m):
    """Quantile by quantile, in a loop, after repeating both samples to a common size."""
    x, y, directions = sets(m=m)
    (gradient,) = torch.autograd.grad(sliced_wasserstein(x, y, directions), x)
    common, total = int(np.lcm(len(x), m)), 0.0
    for theta in directions:
        a = torch.stack(sorted(x @ theta)).repeat_interleave(common // len(x))
        b = torch.stack(sorted(y @ theta)).repeat_interleave(common // m)
        total = total + (a - b).square().mean() / len(directions)
    (expected,) = torch.autograd.grad(total, x)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_any_convex_cost_of_a_difference():
    x, y, directions = sets()

    def huber(t):
        return F.huber_loss(t, torch.zeros_like(t), reduction="none")

    a, b = ((v @ directions.T).sort(0).values for v in (x, y))
    assert sliced_wasserstein(x, y, directions, huber).item() == pytest.approx(huber(a - b).mean().item(), abs=1e-12)


def test_a_shift_costs_its_projections():
    """SW₂² of a set and itself shifted by v is the mean of (θ·v)², |v|² / K for many directions."""
    x, _, directions = sets(projections=20_000)
    v = torch.tensor([1.0, -2, 0, 0, 0.5], dtype=torch.float64)
    assert sliced_wasserstein(x, x + v, directions).item() == pytest.approx(
        (directions @ v).square().mean().item(), abs=1e-9
    )
    assert sliced_wasserstein(x, x + v, directions).item() == pytest.approx(5.25 / 5, rel=0.05)


def test_mmd_against_the_sums_of_its_definition():
    x, y, _ = sets(n=9, m=12, d=3)

    def k(u, v):
        return sum(s * 1.7 / (s * 1.7 + ((u - v) ** 2).sum()) for s in regularisers._IMQ_SCALES)

    def within(z):
        return np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    u, v = x.detach().numpy(), y.numpy()
    expected = within(u) + within(v) - 2 * np.mean([k(a, b) for a in u for b in v])
    assert imq_mmd(x, y, 1.7).item() == pytest.approx(expected, abs=1e-10)
    assert torch.autograd.gradcheck(lambda z: imq_mmd(z, y, 1.7), x)


def test_kl_equals_that_of_torch_distributions():
    g = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 6, 4, generator=g)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(1).mean()
    found = KullbackLeibler()(Coded(mean, mean, mean, log_variance))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_the_regulariser_draws_directions_and_so_many_codes_of_the_prior(k):
    prior, codes = Prior("uniform", k), torch.randn(20, k)
    torch.manual_seed(5)
    found = SlicedWasserstein(prior, 7, 3, power(2))(Coded(codes, codes, codes, codes))
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
    directions = random_directions(7, k, generator)
    expected = sliced_wasserstein(codes, prior.sample(60, generator), directions)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_mmd_is_scaled_by_the_prior():
    """Twice the total variance; of 10,000 draws, whose variances are 1 ± 0.014."""
    assert MaximumMeanDiscrepancy(Prior("gaussian", 4)).scale == pytest.approx(8, rel=0.05)
    assert MaximumMeanDiscrepancy(Prior("uniform", 3)).scale == pytest.approx(2, rel=0.05)


def test_the_critic_of_codes_takes_the_prior_for_true_and_the_encoder_aims_there():
    model, x = model_for(), torch.rand(6, 8, 8, 1)
    critic = Critic((2,), 1, 8, 1)
    players = [make_player(each, OptimiserSettings(), 1) for each in (model, critic)]
    objective = AdversarialAutoencoding(*players, model.prior, Reconstruction(squared=1), 3.0)
    torch.manual_seed(2)
    loss, scalars = objective.loss("critic", {"x": x})
    torch.manual_seed(2)
    drawn = model.prior.sample(6, torch.Generator().manual_seed(int(torch.randint(2**62, (1,)))))
    true, coded = critic(drawn), critic(model.encode(x))
    expected = -true.sigmoid().log().mean() - (1 - coded.sigmoid()).log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert scalars["gap"].item() == pytest.approx((true.mean() - coded.mean()).item(), abs=1e-6)
    loss, _ = objective.loss("model", {"x": x})
    expected = F.mse_loss(model.reconstruct(x), x.flatten(1)) - 3 * coded.sigmoid().log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def model_for(shape=(8, 8, 1), **options):
    torch.manual_seed(0)
    return Autoencoder(shape, 2, {"kind": "gaussian"}, n_hidden=12, width=4, **{"bounded": True, **options})


def test_reconstruction_is_the_weighted_sum_of_its_terms():
    model, x = model_for(), torch.rand(6, 8, 8, 1)
    player = make_player(model, OptimiserSettings(), 1)
    rebuilt, flat = model.reconstruct(x).double(), x.flatten(1).double()
    expected = {
        "cross_entropy": -(flat * rebuilt.log() + (1 - flat) * (1 - rebuilt).log()),
        "absolute": (flat - rebuilt).abs(),
        "squared": (flat - rebuilt).square(),
    }
    for summed in (False, True):
        objective = Autoencoding(player, Reconstruction(2, 3, 5, summed=summed))
        loss, scalars = objective.loss("model", {"x": x})
        weighted = 2 * expected["cross_entropy"] + 3 * expected["absolute"] + 5 * expected["squared"]
        wanted = weighted.sum(1).mean() if summed else weighted.mean()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        for name, value in expected.items():
            assert scalars[name].item() == pytest.approx(value.mean().item(), rel=1e-5)


def test_only_some_images_are_decoded_and_all_codes_count():
    model, x = model_for(), torch.rand(8, 8, 8, 1)
    seen = []
    regulariser = type("Seen", (), {"name": "seen", "__call__": lambda self, c: seen.append(c) or c.codes.sum()})()
    objective = Autoencoding(
        make_player(model, OptimiserSettings(), 1), Reconstruction(squared=1), regulariser, stride=4
    )
    _, scalars = objective.loss("model", {"x": x})
    assert torch.equal(seen[0].codes, model.encode(x))
    wanted = F.mse_loss(model.reconstruct(x[::4]), x[::4].flatten(1))
    assert scalars["squared"].item() == pytest.approx(wanted.item(), rel=1e-6)


def test_deep_features_pull_the_reconstruction_and_leave_the_classifier():
    torch.manual_seed(0)
    classifier, x = Classifier((8, 8, 1), 10, 4, 6), torch.rand(3, 64)
    assert torch.equal(classifier.activations(x)[-1], classifier.features(x))
    before = [p.clone() for p in classifier.parameters()]
    model = model_for(stochastic=True)
    objective = Autoencoding(
        make_player(model, OptimiserSettings(), 1),
        Reconstruction(features=2.0),
        KullbackLeibler(),
        classifier=classifier,
    )
    torch.manual_seed(1)
    loss, scalars = objective.loss("model", {"x": x})
    loss.backward()
    assert model.decoder[-1].weight.grad.abs().sum() > 0
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(classifier.parameters(), before))
    torch.manual_seed(1)
    rebuilt = model.outputs(model(x).raw)
    pairs = list(zip(classifier.activations(x), classifier.activations(rebuilt)))
    assert len(pairs) > 1
    wanted = sum((a - b).square().mean() / 2 for a, b in pairs)
    assert scalars["features"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.item() == pytest.approx(2 * wanted.item() + scalars["kl"].item(), rel=1e-5)
    assert feature_loss(classifier, x, x).item() == 0


KINDS = {
    "swae": {"regulariser": {"projections": 7, "prior_samples": 2}, "prior": "ring", "codes_per_image": 2},
    "mmd": {"regulariser": {"kind": "mmd"}},
    "gan": {"regulariser": {"kind": "gan", "critic": {"n_hidden": 8, "n_layers": 1}}},
}
BATCH, STEPS = 64, 6
ZERO = ("swae", "gan")


def trained(shards, name, rank, world, **how):
    """The final state of a short training."""
    settings = TrainingSettings(
        steps=STEPS, batch_size=BATCH, dequantise=False, optimiser={"learning_rate": 1e-3}, **how
    )
    manifest = load_manifest(shards)
    family = AutoencoderSettings.model_validate({"width": 4, "n_hidden": 12, **KINDS[name]})
    stream = ShardStream(manifest, "train", batch_size=BATCH, seed=0, rank=rank, world_size=world, lanes=2)
    torch.manual_seed(rank)
    objective = family.objective(family.build(manifest), manifest, settings)
    engine = make_engine(settings)
    engine.attach(objective)
    return train(objective, engine, stream, settings)


def on_rank(rank, shards):
    """Fixed codes and directions: loss and gradient of this rank's share; then short trainings."""
    x, y, directions = sets(n=40, m=60)
    share = x.detach()[rank::2].clone().requires_grad_()
    over = OverWorkers()
    loss = over.scaled(regularisers._sorted_cost(over.rows(share @ directions.T), y @ directions.T, power(2)))
    loss.backward()
    alone = OverWorkers(False)
    assert alone.world == 1
    assert dist.get_world_size() == 2
    states = {f"{name}/{key}": v for name in KINDS for key, v in trained(shards, name, rank, 2).items()}
    for name in ZERO:
        zero = trained(shards, name, rank, 2, engine="deepspeed", zero_stage=2)
        states |= {f"{name}/zero-2/{key}": value for key, value in zero.items()}
    return {"loss": loss.detach(), "gradient": share.grad, **states}


@pytest.fixture(scope="module")
def by_rank(digits_pack, tmp_path_factory):
    import test_autoencoding  # by its plain name, so that spawned processes find the function

    return run_ranks(test_autoencoding.on_rank, 2, tmp_path_factory.mktemp("ranks"), digits_pack.base)


def test_the_global_loss_of_two_workers_is_that_of_one(by_rank):
    x, y, directions = sets(n=40, m=60)
    loss = sliced_wasserstein(x, y, directions)
    loss.backward()
    for rank in (0, 1):
        assert by_rank[rank]["loss"].item() == pytest.approx(loss.item(), abs=1e-12)
        # Engines take the mean over workers: half of what each worker hands in.
        assert torch.allclose(by_rank[rank]["gradient"] / 2, x.grad[rank::2], atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_training_on_two_workers_equals_training_on_one(by_rank, digits_pack, name):
    """Directions, draws of the prior and codes are those of one worker, and so are all weights."""
    alone = trained(digits_pack.base, name, 0, 1)
    for rank in (0, 1):
        for key, value in alone.items():
            if value.ndim and value.numel():
                other = by_rank[rank][f"{name}/{key}"]
                assert (other - value).abs().max() <= 2e-5 * value.abs().max().clamp_min(1), key


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_equals_ddp(by_rank, name):
    found = by_rank[0]
    start = f"{name}/zero-2/"
    weights = {key.removeprefix(start): v for key, v in found.items() if key.startswith(start) and ".module." in key}
    assert len(weights) > 10
    for key, value in weights.items():
        if value.numel():
            other = found[f"{name}/{key}"]
            assert (other - value).abs().max() <= 2e-5 * other.abs().max().clamp_min(1), key
