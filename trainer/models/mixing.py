"""The mixing coefficients of a mixture: learnt by gradients or by EM, with a prior that spreads or gathers them.

This file imports only torch and the standard library, so that it travels with a registered model as it is.

References:
    W. Gong, Wasserstein Generative Adversarial Network, MPhil thesis, Cambridge 2017 (§4.2, §6.1.5).
    J. Sethuraman, A constructive definition of Dirichlet priors, 1994 (stick-breaking weights).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Share of the data below which a component has nothing, and what is left of a stick counts as nothing.
_NOTHING = 1e-6
# A component that stands for a share s > κ of the data keeps a weight of about s - κ; by gradients, that of one that
# does not falls for ever. One below this part of κ is pruned.
_PRUNED = 0.1


class MixingWeights(nn.Module):
    """π = softmax(`logits`) of T components; `logits` [T] are a parameter, or a buffer where they are learnt by EM.

    By EM: as batch normalisation keeps running means, `learn` moves π towards the responsibilities of a batch, averaged
    over all workers, π <- π + λ (E[p(c | x)] - π), after the first `start` batches (thesis eq. 4.5-4.8, Algorithm 5).

    Priors, one or none; `n_train` samples are weighed against them:

    - `entropic_weight` λ: the entropic regularisation -1/T Σ log π_c (thesis eq. 4.11) times λ, per sample: a Dirichlet
      prior of λ n_train / T pseudo-samples per component.
    - `stick_breaking` κ, a share of the data: Π_j R_j^(-κ n_train) with R_j what is left of the stick after the j
      largest weights; where κ n_train = 1, the density of stick-breaking weights of concentration -> 0. Each further
      component must stand for a share κ of the data, or its weight goes to zero: it is pruned, see `live`.

    Args:
        n_components: T.
        method: "gradient" (of the logits; thesis eq. 4.9) or "em".
        rate: λ of EM.
        start: batches before EM moves the weights, the thesis' C_start.
        entropic_weight, stick_breaking, n_train: see above.

    Raises:
        ValueError: an unknown method, or two priors.
    """

    def __init__(
        self,
        n_components: int,
        method: Literal["gradient", "em"],
        rate: float,
        start: int,
        entropic_weight: float,
        stick_breaking: float | None,
        n_train: int,
    ) -> None:
        super().__init__()
        if method not in ("gradient", "em"):
            raise ValueError(f"weights are learnt by gradient or em, not by {method!r}")
        if entropic_weight and stick_breaking is not None:
            raise ValueError("entropic_weight spreads the weights, stick_breaking gathers them: choose one")
        self.n_components, self.by_em, self.rate, self.start = n_components, method == "em", rate, start
        self.entropic_weight, self.stick_breaking, self.n_train = entropic_weight, stick_breaking, n_train
        self.logits: Tensor
        if self.by_em:
            self.batches_seen: Tensor
            self.register_buffer("logits", torch.zeros(n_components))
            self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        else:
            self.logits = nn.Parameter(torch.zeros(n_components))

    @property
    def coefficients(self) -> Tensor:
        """π, [T] float64; they sum to one."""
        return self.logits.double().softmax(0)

    @property
    def live(self) -> Tensor:
        """Numbers of the components that are not pruned, int64: π of at least κ / 10, or of 1e-6 without that prior."""
        return (self.coefficients >= max(_PRUNED * (self.stick_breaking or 0.0), _NOTHING)).nonzero().squeeze(1)

    @torch.no_grad()
    def set(self, mixing: Tensor) -> None:
        """Sets π [T]; a zero becomes the smallest number there is."""
        self.logits.copy_(mixing.double().clamp_min(torch.finfo(torch.float32).tiny).log())

    def log(self) -> Tensor:
        """log π, [T]."""
        return self.logits.log_softmax(0)

    def log_prior(self) -> Tensor:
        """Log-density of π under its prior, up to a constant, in nats; zero where there is none."""
        if self.stick_breaking is not None:
            left = self.log().exp().sort().values.cumsum(0)[:-1]  # smallest first: R_{T-1}, ..., R_1
            return -self.stick_breaking * self.n_train * (left + _NOTHING).log().sum()
        return self.entropic_weight * self.n_train / self.n_components * self.log().sum()

    @torch.no_grad()
    def learn(self, responsibilities: Tensor) -> None:
        """A damped M-step by this worker's part of a batch, [batch, T]; every worker calls it, with as many samples."""
        shares = responsibilities.double().mean(0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(shares)
            shares /= dist.get_world_size()
        self.batches_seen += 1
        if int(self.batches_seen) > self.start:
            self.set(torch.lerp(self.coefficients, self.best(shares), self.rate))

    def best(self, shares: Tensor) -> Tensor:
        """π [T] of highest posterior for mean responsibilities [T] (thesis eq. 4.7, with the prior)."""
        if self.stick_breaking is None:
            return (shares + self.entropic_weight / self.n_components) / (1 + self.entropic_weight)
        ranked, order = shares.sort(descending=True)
        after = ranked.flip(0).cumsum(0).flip(0) - ranked
        there = (ranked > _NOTHING).long()
        later = there.flip(0).cumsum(0).flip(0) - there  # components still to come
        rest = (after - self.stick_breaking * later).clamp_min(0)
        broken = torch.where(rest > 0, ranked / (ranked + rest), 1.0)
        left = torch.cat([broken.new_ones(1), (1 - broken).cumprod(0)[:-1]])
        return torch.empty_like(shares).index_put((order,), broken * left)
