"""A density that samples by reparametrisation, small enough to compute by hand what is trained through it."""

import math

import torch
from torch import nn


class GaussianMixture(nn.Module):
    """Σ_c π_c N(x; μ_c, exp(2 s_c) I), with the interface that adversarial training asks of a density."""

    def __init__(self, n_components, n_features, spread=1.0, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.n_components, self.n_features = n_components, n_features
        self.mixing_logits = nn.Parameter(torch.zeros(n_components))
        self.means = nn.Parameter(torch.randn(n_components, n_features, generator=g) * spread)
        self.log_std = nn.Parameter(torch.zeros(n_components, 1) - 0.7)

    def component_log_prob(self, x):
        z = (x.flatten(1).unsqueeze(1) - self.means) * (-self.log_std).exp()
        log_det = self.n_features * (self.log_std.squeeze(1) + 0.5 * math.log(2 * math.pi))
        return self.mixing_logits.log_softmax(0) - 0.5 * z.square().sum(2) - log_det

    def forward(self, x, n=0):
        log_prob = None if x is None else self.component_log_prob(x).logsumexp(1)
        log_prior = -0.5 * self.means.square().sum()
        if not n:
            return log_prob, log_prior
        z, component = self._noise(n)
        return log_prob, log_prior, self.means[component] + self.log_std[component].exp() * z, component

    def _noise(self, n):
        component = torch.multinomial(self.mixing_logits.detach().softmax(0), n, replacement=True)
        return torch.randn(n, self.n_features, dtype=self.means.dtype), component
