"""N workers equal one worker, DeepSpeed equals DDP, and a resumed run equals one that was never stopped."""

import pytest
import torch
from distributed import run_ranks

from data.manifest import load_manifest
from data.stream import ShardStream
from trainer.engines import make_engine
from trainer.loop import Callbacks, train
from trainer.models.mfa import MFA
from trainer.objectives.likelihood import MaximumLikelihood
from trainer.players import make_player
from trainer.settings import OptimiserSettings, TrainingSettings

STEPS = 20
BATCH = 96  # 14 steps an epoch: 20 steps cross its end, and so do those after the checkpoint
ENGINES = ["ddp", "zero-0", "zero-1", "zero-2", "zero-3"]


def settings_for(engine, optimiser="adam", clip=None, steps=STEPS):
    average = 0.9 if optimiser == "adam" else 0.0
    return TrainingSettings(
        steps=steps,
        batch_size=BATCH,
        seed=3,
        lanes=2,
        engine="ddp" if engine == "ddp" else "deepspeed",
        zero_stage=0 if engine == "ddp" else int(engine[-1]),
        checkpoint_every=8,
        optimiser=OptimiserSettings(
            name=optimiser, learning_rate=1e-3, schedule="cosine", gradient_clip=clip, average=average
        ),
    )


def starting_model(seed):
    """Not the same on every rank: the engine must give all of them rank 0's."""
    torch.manual_seed(seed)
    model = MFA(3, 64, 3)  # an odd number of logits, which two ranks cannot share evenly
    model.set_components(torch.ones(3), torch.rand(3, 64), torch.randn(3, 64, 3) * 0.1, torch.full((3, 64), 0.05))
    model.set_noise_prior(3.0, torch.full((64,), 0.05))
    return model


def run(shards, settings, rank=0, world_size=1, *, resume=None, stop_at=None):
    """Trains; returns the final state, and the state of the checkpoint at step 8."""
    manifest = load_manifest(shards)
    stream = ShardStream(
        manifest, "train", batch_size=BATCH, seed=3, rank=rank, world_size=world_size, lanes=2, dequantise=True
    )
    model = starting_model(rank)
    player = make_player(model, settings.optimiser, settings.steps)
    objective = MaximumLikelihood(player, manifest.n_samples("train"))
    engine = make_engine(settings)
    engine.attach(objective)
    saved = {}

    def keep(step, state):
        saved[step] = state

    final = train(objective, engine, stream, settings, callbacks=Callbacks(on_checkpoint=keep), resume=resume)
    return final, saved.get(8)


def on_rank(rank, shards):
    """Every engine in turn, uninterrupted and resumed from step 8; and a checkpoint of one engine in the others."""
    out, checkpoints = {}, {}
    for engine in ENGINES:
        out[engine], checkpoints[engine] = run(shards, settings_for(engine), rank, 2)
        out[engine + " resumed"], _ = run(shards, settings_for(engine), rank, 2, resume=(8, checkpoints[engine]))
    for engine in ENGINES[1:]:
        out["ddp to " + engine], _ = run(shards, settings_for(engine), rank, 2, resume=(8, checkpoints["ddp"]))
        out[engine + " to ddp"], _ = run(shards, settings_for("ddp"), rank, 2, resume=(8, checkpoints[engine]))
    earlier = {name: v for name, v in checkpoints["ddp"].items() if not name.endswith((".average", ".averaged"))}
    for engine in ("ddp", "zero-0", "zero-2"):
        out["earlier to " + engine], _ = run(shards, settings_for(engine), rank, 2, resume=(8, earlier))
    out["sgd"], _ = run(shards, settings_for("ddp", "sgd", clip=0.5), rank, 2)
    out["sgd zero-2"], _ = run(shards, settings_for("zero-2", "sgd", clip=0.5), rank, 2)
    return out


@pytest.fixture(scope="module")
def by_rank(digits_pack, tmp_path_factory):
    import test_engines  # by its plain name, so that spawned processes find the function

    return run_ranks(test_engines.on_rank, 2, tmp_path_factory.mktemp("ranks"), digits_pack.base)


def difference(a, b):
    """Largest difference of any parameter or moment; relative to the tensor's size where that exceeds one."""
    assert a.keys() == b.keys()
    pairs = [(a[name].double(), b[name].double()) for name in a if a[name].numel()]
    return max(((x - y).abs().max() / x.abs().max().clamp_min(1)).item() for x, y in pairs)


def test_two_ddp_workers_equal_one_process(by_rank, digits_pack):
    alone, _ = run(digits_pack.base, settings_for("ddp"))
    assert difference(alone, by_rank[0]["ddp"]) < 1e-5
    clipped, _ = run(digits_pack.base, settings_for("ddp", "sgd", clip=0.5))
    assert difference(clipped, by_rank[0]["sgd"]) < 1e-5


def test_all_ranks_hold_the_same_state(by_rank):
    for name, state in by_rank[0].items():
        assert difference(state, by_rank[1][name]) == 0, name


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_deepspeed_equals_ddp(by_rank, engine):
    assert difference(by_rank[0]["ddp"], by_rank[0][engine]) < 1e-6


def test_deepspeed_equals_ddp_with_clipping(by_rank):
    assert difference(by_rank[0]["sgd"], by_rank[0]["sgd zero-2"]) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_equals_uninterrupted(by_rank, engine):
    assert difference(by_rank[0][engine], by_rank[0][engine + " resumed"]) < 1e-6


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_checkpoints_do_not_know_their_engine(by_rank, engine):
    assert difference(by_rank[0]["ddp"], by_rank[0]["ddp to " + engine]) < 1e-6
    assert difference(by_rank[0]["ddp"], by_rank[0][engine + " to ddp"]) < 1e-6


@pytest.mark.parametrize("engine", ["zero-0", "zero-2"])
def test_averages_start_where_a_checkpoint_has_none(by_rank, engine):
    assert difference(by_rank[0]["earlier to ddp"], by_rank[0]["earlier to " + engine]) < 1e-6


def test_a_checkpoint_of_two_workers_goes_on_with_one(by_rank, digits_pack):
    _, checkpoint = run(digits_pack.base, settings_for("ddp"))
    alone, _ = run(digits_pack.base, settings_for("ddp"), resume=(8, checkpoint))
    assert difference(alone, by_rank[0]["ddp"]) < 1e-5


def test_deepspeed_runs_alone(digits_pack):
    alone, _ = run(digits_pack.base, settings_for("ddp"))
    try:
        state, _ = run(digits_pack.base, settings_for("zero-1"))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert difference(alone, state) < 1e-6
