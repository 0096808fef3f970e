"""Averages of weights, by hand and in the model that a training leaves."""

import pytest
import torch
from torch import nn

from data.manifest import load_manifest
from trainer.fit import Fit, trained_tensors
from trainer.models.mfa import MFA
from trainer.players import make_player
from trainer.settings import OptimiserSettings, TrainingSettings


@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd"])
def test_an_average_by_hand(name):
    """Decay is (1 + t) / (10 + t) until that exceeds what is set, and the weights themselves are as without."""
    torch.manual_seed(0)
    plain, averaged = nn.Linear(3, 2), nn.Linear(3, 2)
    averaged.load_state_dict(plain.state_dict())
    players = [
        make_player(module, OptimiserSettings(name=name, learning_rate=0.1, average=average), 6)
        for module, average in ((plain, 0.0), (averaged, 0.2))
    ]
    expected, x = None, torch.randn(5, 3)
    for step in range(6):
        for player in players:
            player.optimiser.zero_grad()
            player.module(x).square().sum().backward()
            player.optimiser.step()
        now = averaged.weight.detach().clone()
        decay = min(0.2, (1 + step) / (10 + step))
        expected = now if step == 0 else decay * expected + (1 - decay) * now
    state = players[1].optimiser.state[averaged.weight]
    assert torch.allclose(state["average"], expected, atol=1e-6)
    assert torch.equal(plain.weight, averaged.weight)
    assert not torch.allclose(state["average"], averaged.weight, atol=1e-4)


def test_what_does_not_move_has_no_average():
    """A parameter without a gradient must not get a state: Adam would take it for its own."""
    module = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    player = make_player(module, OptimiserSettings(average=0.5), 2)
    for part in module:
        player.optimiser.zero_grad()
        part(torch.ones(1, 1)).sum().backward()
        player.optimiser.step()
    assert all("average" in player.optimiser.state[p] for p in module.parameters())


def test_a_trained_model_has_the_averages(digits_pack):
    manifest = load_manifest(digits_pack.base)
    settings = TrainingSettings(steps=5, batch_size=32, optimiser=OptimiserSettings(learning_rate=1e-2, average=0.5))
    torch.manual_seed(0)
    model = MFA(2, 64, 2)
    model.set_components(torch.ones(2), torch.rand(2, 64), torch.randn(2, 64, 2) * 0.1, torch.full((2, 64), 0.05))
    state = Fit(model, manifest, settings).run()
    tensors = trained_tensors(state)
    for name, last in model.named_parameters():
        assert torch.equal(tensors[name], state[f"model.optimiser.{name}.average"])
        assert not torch.equal(tensors[name], last)
