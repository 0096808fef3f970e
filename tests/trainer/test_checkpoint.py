"""Stored models: whatever is wrong with one is told in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.models import LocalModel
from data.errors import UserError
from trainer.checkpoint import load_model, save_model
from trainer.loop import _mix
from trainer.models.mfa import MFA


@pytest.fixture
def stored(tmp_path, manifest_for):
    """The folder of a small model."""
    save_model(str(tmp_path), MFA(2, 4, 1), "mfa", manifest_for((2, 2)), dequantised=False)
    assert load_model(str(tmp_path))[0].n_features == 4
    return tmp_path


def refused(folder, part="model"):
    with pytest.raises(UserError, match=part) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        *({"format": 2}, {"format": None}, {"family": "factor_analysis"}, {"family": "..x"}, {"family": 3}),
        *({"arguments": []}, {"arguments": {"n_components": 10**12, "n_features": 4, "n_factors": 1}}),
        *({"data": None}, {"data": []}, {"data": {}}),
    ],
)
def test_a_description_that_is_wrong(stored, change):
    path = Path(stored / "model.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(stored)


@pytest.mark.parametrize("shape", [None, "ab", [], [3, 3], [-2, -2], [2.0, 2], [True, 4], [10**30]])
def test_a_shape_that_does_not_fit(stored, shape):
    path = Path(stored / "model.json")
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "data": {**document["data"], "shape": shape}}))
    refused(stored, "shape")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(stored, value):
    weights = load_file(stored / "weights.safetensors")
    weights["mixing_logits"][1] = value
    save_file(weights, stored / "weights.safetensors")
    document = json.loads((stored / "model.json").read_text())
    del document["weights_sha256"]  # as it was before there was a checksum
    (stored / "model.json").write_text(json.dumps(document))
    refused(stored, "mixing_logits holds NaN or infinite")


def test_files_that_are_damaged(stored):
    weights = stored / "weights.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:-5], whole[:5] + b"\xff" + whole[6:]):
        weights.write_bytes(content)
        refused(stored, "damaged")
    weights.write_bytes(whole)
    for text in ("", "[1]", "[" * 100_000):
        (stored / "model.json").write_text(text)
        refused(stored, "damaged")


def test_samples_that_are_not_finite(stored):
    weights = load_file(stored / "weights.safetensors")
    weights["log_noise_variance"][:] = 1e30
    save_file(weights, stored / "weights.safetensors")
    with pytest.raises(UserError, match="train it again"):
        LocalModel(str(stored)).sample(3, 0)


def test_any_seed_step_and_rank_make_a_seed_of_64_bits():
    for seed in (0, 2**32 - 1, 2**70):
        torch.manual_seed(_mix(seed, 10**9, 10**4))
    assert _mix(3, 5, 1) == (3 * 1_000_003 + 5) * 65_537 + 1


def test_a_flipped_bit_in_the_weights(stored):
    path = stored / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))
    refused(stored, "checksum")
