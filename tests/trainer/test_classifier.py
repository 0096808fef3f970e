"""The classifier: the contract of models, labels that are refused, and workers that train one network."""

import numpy as np
import pytest
import torch
from distributed import run_ranks

from data.errors import UserError
from data.manifest import load_manifest
from data.shards import pack
from data.sources import open_source
from data.stream import read_blocks, read_labels
from trainer.checkpoint import load_model, save_model
from trainer.families.classifier import ClassifierSettings
from trainer.fit import Fit, trained_tensors
from trainer.loop import Callbacks
from trainer.models.classifier import Classifier
from trainer.settings import InitialisationSettings, OptimiserSettings, TrainingSettings


def random_classifier(shape, n_classes=3, **options):
    torch.manual_seed(0)
    return Classifier(shape, n_classes, width=8, n_hidden=12, **options)


# grey, no channel axis, RGB and wide, large, more channels than RGB, below 8 pixels, vectors, one feature
SHAPES = [(8, 8, 1), (28, 28), (9, 40, 3), (70, 65, 3), (16, 16, 5), (5, 6, 1), (20,), (1,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_contract(shape, tmp_path, manifest_for):
    model = random_classifier(shape)
    x = torch.rand(7, *shape, generator=torch.Generator().manual_seed(1))
    model.set_scale(x)
    logits, features = model(x), model.features(x)
    assert logits.shape == (7, 3)
    assert features.shape == (7, 12)
    assert torch.allclose(model.head(features), logits)
    assert torch.allclose(model.probabilities(x).sum(1), torch.ones(7))
    assert torch.allclose(model(x.flatten(1)), logits)
    assert torch.allclose(model(x[2:3]), logits[2:3], atol=1e-5)  # no sample depends on the others
    assert model.probabilities(x[:0]).shape == (0, 3)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    save_model(str(tmp_path), model, "classifier", manifest_for(shape), dequantised=False, scores={"a": 0.5})
    again, document = load_model(str(tmp_path))
    assert torch.equal(again(x), model(x))
    assert document["scores"] == {"a": 0.5}
    with pytest.raises(ValueError, match="features"):
        model(torch.zeros(2, model.n_features + 1))


def test_pixels_stay_where_they_are():
    """A sample's rows, columns and channels reach the network as an image: it sees a transposed one otherwise."""
    model = random_classifier((12, 12, 3))
    x = torch.rand(1, 12, 12, 3, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(model(x), model(x.transpose(1, 2)), atol=1e-4)
    assert not torch.allclose(model(x), model(x.flip(3)), atol=1e-4)
    first = model.body[0](x.permute(0, 3, 1, 2))
    seen = []
    model.body[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    model(x)
    assert torch.allclose(seen[0], first)


def test_inputs_are_brought_to_unit_scale():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e4, 0]) + 7
    model = random_classifier((4,))
    model.set_scale(x)
    scaled = (x - model.offset) / model.scale
    assert torch.allclose(scaled.mean(0), torch.zeros(4), atol=1e-3)
    assert torch.allclose(scaled.std(0, correction=0), torch.tensor([1.0, 1, 1, 0]), atol=1e-3)


@pytest.mark.parametrize("arguments", [((), 3), ((4,), 1), ((0, 3), 3), ((4,), 3, 0), ((4,), 3, 8, 0)])
def test_sizes_that_make_no_network(arguments):
    with pytest.raises(ValueError, match="n_classes >= 2"):
        Classifier(*arguments)


def settings_for(engine="ddp", zero=0):
    return TrainingSettings(
        steps=12,
        batch_size=96,
        lanes=2,
        dequantise=False,
        engine=engine,
        zero_stage=zero,
        checkpoint_every=5,
        optimiser=OptimiserSettings(learning_rate=2e-3),
    )


def trained(shards, rank=0, world_size=1, settings=None):
    """Final tensors, starting on each rank from other weights: all must take over rank 0's."""
    manifest, family = load_manifest(shards), ClassifierSettings(width=8, n_hidden=16)
    torch.manual_seed(rank)
    model, settings = family.build(manifest), settings or settings_for()
    if rank == 0:
        family.initialise(model, manifest, settings, InitialisationSettings())
    options = {"rank": rank, "world_size": world_size, "lanes": 2, "objective": family.objective}
    return trained_tensors(Fit(model, manifest, settings, **options).run())


def on_rank(rank, shards):
    return {
        "ddp": trained(shards, rank, 2),
        "zero": trained(shards, rank, 2, settings_for("deepspeed", 2)),
    }


def test_two_workers_train_the_network_of_one(digits_pack, tmp_path):
    import test_classifier  # by its plain name, so that spawned processes find the function

    alone = trained(digits_pack.base)
    ranks = run_ranks(test_classifier.on_rank, 2, tmp_path, digits_pack.base)
    assert set(alone) == set(Classifier((8, 8, 1), 10).state_dict())
    for name, value in alone.items():
        assert torch.equal(ranks[0]["ddp"][name], ranks[1]["ddp"][name]), name
        assert torch.allclose(value, ranks[0]["ddp"][name], atol=1e-5), name
        assert torch.allclose(value, ranks[0]["zero"][name], atol=1e-5), name


def test_resumed_equals_uninterrupted(digits_pack):
    manifest, family, saved = load_manifest(digits_pack.base), ClassifierSettings(width=8, n_hidden=16), {}

    def run(resume=None):
        torch.manual_seed(0)
        model = family.build(manifest)
        if resume is None:  # a checkpoint holds the inputs' scale too
            family.initialise(model, manifest, settings_for(), InitialisationSettings())
        fit = Fit(model, manifest, settings_for(), lanes=2, objective=family.objective)
        return fit.run(Callbacks(on_checkpoint=saved.__setitem__), resume)

    whole = run()
    resumed = run((5, saved[5]))
    assert whole.keys() == resumed.keys()
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)


def test_labels_are_read_without_their_samples(digits_pack):
    for split in ("train", "test"):
        blocks = np.concatenate([block["label"] for block in read_blocks(digits_pack, split)])
        assert np.array_equal(read_labels(digits_pack, split), blocks)


def packed(tmp_path, labels, x=None):
    content = {"x": np.zeros((len(labels), 3), np.float32) if x is None else x, "y": np.array(labels)}
    np.savez(tmp_path / "d.npz", **content)
    return pack(open_source(f"array:{tmp_path}/d.npz"), str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("labels", "settings", "parts"),
    [
        ([3] * 20, {}, ["class 3", "two classes"]),
        ([0] * 20, {}, ["class 0", "two classes"]),
        ([1, 2] * 20, {}, ["from 1 to 2", "none is 0"]),
        ([0, 1, 3] * 20, {}, ["none is 2", "model.n_classes"]),
        ([-1, 1] * 20, {}, ["from -1 to 1", "0 to 1"]),
        ([0, 1, 2, 3] * 20, {"n_classes": 3}, ["from 0 to 3", "0 to 2"]),
        ([0, 2**62] * 20, {}, ["none is 1"]),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, settings, parts):
    manifest = packed(tmp_path, labels)
    with pytest.raises(UserError) as caught:
        ClassifierSettings(**settings).check(manifest, InitialisationSettings())
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_data_without_labels_and_with_all_that_is_needed(tmp_path, array_file):
    none = pack(open_source(f"array:{array_file(np.zeros((20, 3)))}"), str(tmp_path / "none"))
    with pytest.raises(UserError, match="no labels"):
        ClassifierSettings().check(none, InitialisationSettings())
    with pytest.raises(UserError, match="no labels"):
        read_labels(none, "train")
    gap = packed(tmp_path, [0, 1, 3] * 20)
    ClassifierSettings(n_classes=5).check(gap, InitialisationSettings())
    assert ClassifierSettings(n_classes=5).build(gap).n_classes == 5
