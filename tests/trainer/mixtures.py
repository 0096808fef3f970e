"""Mixtures to test with."""

import torch

from trainer.models.mfa import MFA


def random_mfa(n_components, n_features, n_factors, *, noise=0.1, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    model = MFA(n_components, n_features, n_factors).double()
    model.set_components(
        torch.rand(n_components, generator=g) + 0.1,
        torch.randn(n_components, n_features, generator=g, dtype=torch.float64),
        torch.randn(n_components, n_features, n_factors, generator=g, dtype=torch.float64) * 0.5,
        noise * (0.5 + torch.rand(n_components, n_features, generator=g, dtype=torch.float64)),
    )
    return model.to(dtype)
