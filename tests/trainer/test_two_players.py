"""Two players over two workers: N workers equal one, DeepSpeed equals DDP, resumed equals uninterrupted."""

import pytest
import torch
from distributed import run_ranks

from data.manifest import load_manifest
from data.stream import ShardStream
from trainer import loop
from trainer.engines import make_engine
from trainer.loop import Callbacks, train
from trainer.models.flow import Flow
from trainer.models.gan import Critic, Generator
from trainer.objectives.adversarial import Adversarial
from trainer.objectives.likelihood import PretrainedLikelihood
from trainer.objectives.transport import Transport
from trainer.players import make_player
from trainer.settings import OptimiserSettings, TrainingSettings

BATCH, STEPS, SAVED = 96, 10, 4
ENGINES = ["ddp", "zero-0", "zero-1", "zero-2"]
CLIP = 0.02
GP = {"critic_steps": 2, "gradient_penalty": 10.0}
# Arguments of the objective; a density where it needs one, else images by convolutions.
OBJECTIVES = {
    "wgan-gp": GP,
    "wgan-clip": {"critic_steps": 3},
    "gan of a density": {"critic_steps": 1, "loss": "non-saturating"},  # its weights get no gradient at all
    "pgan": {**GP, "assignment": "posterior", "likelihood_weight": 0.1, "pretrain_steps": 6},
    "sinkhorn": {"epsilon": 0.1, "iterations": 5, "critic_steps": 2},
}


class _Shared:
    """Every rank draws the noise of all, and takes its own rows: then N workers have the numbers of one."""

    rank, world = 0, 1

    def rows(self, draw, n):
        return tuple(part[self.rank * n : (self.rank + 1) * n] for part in draw(self.world * n))


SHARED = _Shared()


class SharedGenerator(Generator):
    def _noise(self, n, generator=None):
        return SHARED.rows(lambda all_: (super(SharedGenerator, self)._noise(all_),), n)[0]


class SharedFlow(Flow):
    def _draw(self, n, generator):
        return SHARED.rows(lambda all_: super(SharedFlow, self)._draw(all_, generator), n)


class SharedAdversarial(Adversarial):
    def _interpolation(self, n):
        return SHARED.rows(lambda all_: (super(SharedAdversarial, self)._interpolation(all_),), n)[0]


def objective_for(name, seed):
    """Not the same start on every rank: the engine must give all of them rank 0's."""
    torch.manual_seed(seed)
    options = OBJECTIVES[name]
    dense = name in ("pgan", "gan of a density")
    if dense:  # its weights by EM, or by gradient
        weights = "em" if name == "pgan" else "gradient"
        network = SharedFlow((64,), 3, 2, width=8, n_layers=1, affine="none", weights=weights)
    else:
        network = SharedGenerator((8, 8, 1), n_latent=4, width=4, bounded=True)
    critics = 3 if name == "pgan" else 4 if name == "sinkhorn" else 1
    critic = Critic((64,) if dense else (8, 8, 1), critics, n_hidden=12, n_layers=2, n_shared=1, width=4)
    adam = OptimiserSettings(learning_rate=1e-3, beta1=0.5, beta2=0.9)
    rms = OptimiserSettings(name="rmsprop", learning_rate=2e-3, beta1=0.0, beta2=0.99)
    clipped = name in ("wgan-clip", "sinkhorn")
    players = [
        make_player(network, rms if name == "wgan-clip" else adam, STEPS),
        make_player(critic, rms if clipped else adam, STEPS, weight_clip=CLIP if clipped else None),
    ]
    if name == "sinkhorn":
        return Transport(*players, **options)
    return SharedAdversarial(*players, likelihood=PretrainedLikelihood(players[0], 1000, 3, 6), **options)


def run(shards, name, engine, rank=0, world_size=1, *, resume=None):
    """Trains; returns the final state and the checkpoint's."""
    SHARED.rank, SHARED.world = rank, world_size
    loop._mix = lambda seed, step, rank: 1000 * seed + step
    settings = TrainingSettings(
        steps=STEPS,
        batch_size=BATCH,
        lanes=2,
        dequantise=False,
        engine="ddp" if engine == "ddp" else "deepspeed",
        zero_stage=0 if engine == "ddp" else int(engine[-1]),
        checkpoint_every=SAVED,
    )
    stream = ShardStream(
        load_manifest(shards), "train", batch_size=BATCH, seed=0, rank=rank, world_size=world_size, lanes=2
    )
    objective = objective_for(name, seed=rank)
    made = make_engine(settings)
    made.attach(objective)
    saved = {}
    calls = Callbacks(on_checkpoint=saved.__setitem__)
    final = train(objective, made, stream, settings, callbacks=calls, resume=resume)
    return final, saved.get(SAVED)


def on_rank(rank, shards, names):
    out = {}
    for name in names:
        first = None
        for engine in ENGINES:
            out[f"{name}/{engine}"], saved = run(shards, name, engine, rank, 2)
            first = first or saved
            if engine in ("ddp", "zero-0", "zero-2"):
                out[f"{name}/{engine} resumed"], _ = run(shards, name, engine, rank, 2, resume=(SAVED, first))
    return out


@pytest.fixture(scope="module")
def by_rank(digits_pack, tmp_path_factory):
    import test_two_players  # by its plain name, so that spawned processes find the function

    return run_ranks(test_two_players.on_rank, 2, tmp_path_factory.mktemp("ranks"), digits_pack.base, list(OBJECTIVES))


@pytest.fixture
def seeds(monkeypatch):
    monkeypatch.setattr(loop, "_mix", loop._mix)  # restored when the test ends


def difference(a, b):
    """Largest difference of any parameter or moment; relative to the tensor's size where that exceeds one."""
    assert a.keys() == b.keys()
    pairs = [(a[name].double(), b[name].double()) for name in a if a[name].numel()]
    return max(((x - y).abs().max() / x.abs().max().clamp_min(1)).item() for x, y in pairs)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sinkhorn"])
def test_two_workers_equal_one(by_rank, digits_pack, seeds, name):
    """Of transport they are not to: each worker transports a mini-batch of its own.

    The bias of a Wasserstein critic's unit that is always on shifts the values of data and samples alike: its gradient
    is rounding, which Adam and RMSProp scale up, and it changes nothing. So biases may differ there.
    """
    alone, _ = run(digits_pack.base, name, "ddp")
    shifts = ("critic.module", "bias") if name.startswith("wgan") else ("none", "")
    states = (alone, by_rank[0][f"{name}/ddp"])
    pair = [{k: v for k, v in s.items() if not (k.startswith(shifts[0]) and k.endswith(shifts[1]))} for s in states]
    assert difference(*pair) < 2e-5


def test_all_ranks_hold_the_same_state(by_rank):
    for name, state in by_rank[0].items():
        assert difference(state, by_rank[1][name]) == 0, name


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_deepspeed_equals_ddp(by_rank, name, engine):
    assert difference(by_rank[0][f"{name}/ddp"], by_rank[0][f"{name}/{engine}"]) < 1e-5


@pytest.mark.parametrize("engine", ["ddp", "zero-0", "zero-2"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_resumed_equals_uninterrupted(by_rank, name, engine):
    """From DDP's checkpoint, also at a step at which PGAN's critic has not moved yet."""
    assert difference(by_rank[0][f"{name}/{engine}"], by_rank[0][f"{name}/{engine} resumed"]) < 1e-5


@pytest.mark.parametrize("run_of", [*ENGINES, "ddp resumed", "zero-2 resumed"])
def test_clipped_weights_stay_clipped(by_rank, run_of):
    state = by_rank[0][f"wgan-clip/{run_of}"]
    weights = [
        value
        for key, value in state.items()
        if key.startswith("critic.module.") and key[14:20] not in ("offset", "scale")
    ]
    assert max(w.abs().max().item() for w in weights) == pytest.approx(CLIP)
    assert max(v.abs().max().item() for k, v in state.items() if k.startswith("model.module.")) > 2 * CLIP
