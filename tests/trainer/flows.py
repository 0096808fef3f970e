"""Flows to test with."""

import math

import torch

from trainer.models.flow import Flow


def random_flow(shape, n_components=1, *, seed=0, dtype=torch.float64, size=0.3, **options):
    """A flow whose every parameter is random: the networks' last layers are not zero."""
    options = {"width": 16, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Flow(shape, n_components, **options).double()
        for name, value in model.named_parameters():
            last = name.startswith("body") and not value.any()
            fan_in = {3: value.shape[1:2], 4: value.shape[1:]}.get(value.ndim, ()) if last else ()
            spread = size / math.prod(fan_in) ** 0.5 if last or not name.startswith("body") else 0.0
            value.data += torch.randn_like(value) * spread
        if model.mixing.by_em:
            model.mixing.logits += torch.randn(n_components)
    return model.to(dtype).eval()
