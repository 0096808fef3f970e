"""Autoencoders with their codes shaped to a prior: c(x, ψ(φ(x))) + λ D(p_Z, q_Z), and several D.

Sources: S. Kolouri et al., Sliced-Wasserstein Autoencoder, 2018 (equations 9, 14-16; supplement); D. Kingma,
M. Welling, Auto-Encoding Variational Bayes, 2013; I. Tolstikhin et al., Wasserstein Auto-Encoders, 2018 (WAE-MMD,
WAE-GAN); A. Makhzani et al., Adversarial Autoencoders, 2015, and W. Gong's thesis, 2017, (2.24); X. Hou et al., Deep
Feature Consistent Variational Autoencoder, 2017.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.models.autoencoder import Coded
from trainer.models.classifier import Classifier
from trainer.models.priors import Prior
from trainer.objectives import Batch, Player

Cost = Callable[[Tensor], Tensor]
_IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SCALE_DRAWS = 10_000


def power(p: float) -> Cost:
    """The transport cost |t|^p of a difference t, p >= 1."""
    return torch.square if p == 2 else lambda t: t.abs() ** p


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor, cost: Cost = torch.square) -> Tensor:
    """1/L Σ_l ∫ c(F⁻¹(t) - G⁻¹(t)) dt, F and G the distributions of x and y projected on direction θ_l (14-16).

    Exact for any sizes: quantile functions of samples are steps. At n = m it is the mean of c over sorted pairs.

    Args:
        x, y: samples [n, K] and [m, K].
        directions: θ, [L, K], of unit length.
        cost: c, a convex function of the difference of two reals, element by element; by default its square.
    """
    return _sorted_cost(x @ directions.T, y @ directions.T, cost)


def _sorted_cost(a: Tensor, b: Tensor, cost: Cost) -> Tensor:
    """Mean over columns of the one-dimensional transport cost between projections a [n, L] and b [m, L]."""
    a, b = (values.T.contiguous().sort(1).values for values in (a, b))
    if a.shape == b.shape:
        return cost(a - b).mean()
    if b.shape[1] % a.shape[1] == 0:  # every quantile of x meets so many of y
        return cost(a.unsqueeze(2) - b.unflatten(1, (a.shape[1], -1))).mean()
    widths, from_a, from_b = _common_steps(a.shape[1], b.shape[1])
    weights = widths.to(a)
    return (cost(a[:, from_a.to(a.device)] - b[:, from_b.to(a.device)]) @ weights).mean()


@functools.lru_cache(maxsize=8)
def _common_steps(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces on which both quantile functions are constant: widths, and the order statistics there."""
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    return widths, (ends - 1) // m, (ends - 1) // n


def random_directions(n: int, dimension: int, generator: torch.Generator) -> Tensor:
    """n directions [n, dimension], uniform on the sphere."""
    return F.normalize(torch.randn(n, dimension, generator=generator, device=generator.device), dim=1)


def imq_mmd(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """The unbiased squared MMD between x [n, K] and y [m, K] by k(u, v) = Σ_s s C / (s C + |u - v|²), C = `scale`.

    Tolstikhin et al., Algorithm 2, with their seven s from 0.1 to 10. May be below zero.
    """

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        squares = u.square().sum(1, keepdim=True) + v.square().sum(1) - 2 * u @ v.T
        squares = squares.clamp_min(0)
        return sum((s * scale / (s * scale + squares) for s in _IMQ_SCALES), torch.zeros_like(squares))

    def within(u: Tensor) -> Tensor:
        n = len(u)
        return (kernel(u, u).sum() - n * len(_IMQ_SCALES)) / (n * (n - 1))  # k(u, u) is one for each s

    return within(x) + within(y) - 2 * kernel(x, y).mean()


class OverWorkers:
    """Losses over the samples of all workers, of which each worker takes the gradient in its own share.

    Every worker's loss is that of one worker with all samples. Engines average gradients over workers, where the
    gradient of a shared loss is the sum of those in the shares: `scaled` makes up for that.

    Args:
        active: false keeps every worker to its own samples.
    """

    def __init__(self, active: bool = True) -> None:
        self.world = dist.get_world_size() if active and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all workers, [world * n, d], for x [n, d]; gradients flow to the own ones."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous())
        parts[self.rank] = x
        return torch.cat(parts)

    def scaled(self, loss: Tensor) -> Tensor:
        """The same value with `world` times the gradient."""
        return loss if self.world == 1 else loss.detach() + self.world * (loss - loss.detach())

    def generator(self, device: torch.device) -> torch.Generator:
        """Random numbers of this step, from rank 0's default generator: N workers draw what one would."""
        seed = torch.randint(2**62, (1,)).to(device)
        if self.world > 1:
            dist.broadcast(seed, 0)
        return torch.Generator(device).manual_seed(int(seed))


class Regulariser(Protocol):
    """D(p_Z, q_Z) of what the encoder gave for the local batch, a scalar; `name` is that in the log."""

    name: str

    def __call__(self, coded: Coded) -> Tensor: ...


class SlicedWasserstein:
    """SW_c between codes and draws of the prior, over new directions in every step; in units of the cost.

    Args:
        prior: of the codes.
        projections: L.
        prior_samples: draws for each code.
        cost: of a difference.
        workers: whose samples are taken together.
    """

    name = "sliced_wasserstein"

    def __init__(
        self, prior: Prior, projections: int, prior_samples: int, cost: Cost, workers: OverWorkers | None = None
    ) -> None:
        self.prior, self.projections, self.prior_samples, self.cost = prior, projections, prior_samples, cost
        self.workers = workers or OverWorkers()

    def __call__(self, coded: Coded) -> Tensor:
        codes, workers = coded.codes, self.workers
        generator = workers.generator(codes.device)
        directions = random_directions(self.projections, codes.shape[1], generator).to(codes)
        drawn = self.prior.sample(len(codes) * workers.world * self.prior_samples, generator)
        projected = workers.rows(codes @ directions.T)
        return workers.scaled(_sorted_cost(projected, drawn @ directions.T, self.cost))


class MaximumMeanDiscrepancy:
    """Squared MMD between codes and as many draws of the prior, by inverse multiquadratics of the prior's size.

    C is twice the prior's total variance: 2 K σ² of a Gaussian, as in the paper.
    """

    name = "mmd"

    def __init__(self, prior: Prior, workers: OverWorkers | None = None) -> None:
        self.prior, self.workers = prior, workers or OverWorkers()

    @functools.cached_property
    def scale(self) -> float:
        """C, from draws of their own seed."""
        generator = torch.Generator(self.prior.points.device).manual_seed(0)
        return 2 * float(self.prior.sample(_SCALE_DRAWS, generator).double().var(0).sum())

    def __call__(self, coded: Coded) -> Tensor:
        codes, workers = coded.codes, self.workers
        drawn = self.prior.sample(len(codes) * workers.world, workers.generator(codes.device))
        return workers.scaled(imq_mmd(workers.rows(codes), drawn, self.scale))


class KullbackLeibler:
    """Mean KL(N(μ(x), σ(x)²) || N(0, I)) of a stochastic encoder, in nats per sample."""

    name = "kl"

    def __call__(self, coded: Coded) -> Tensor:
        mean, log_variance = coded.mean, coded.log_variance
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


@dataclass(frozen=True)
class Reconstruction:
    """Weights of the terms of c(x, ψ(z)): each is a mean over features, or with `summed` their sum; x̂ = ψ(z).

    Attributes:
        cross_entropy: -x log x̂ - (1 - x) log(1 - x̂), in nats, for values in [0, 1].
        absolute: |x - x̂|.
        squared: (x - x̂)²; this and the former in units of the data's scale, where it is not bounded.
        features: Σ over hidden layers Φ of a classifier of ½ mean (Φ(x) - Φ(x̂))² (Hou et al.); never summed.
    """

    cross_entropy: float = 0.0
    absolute: float = 0.0
    squared: float = 0.0
    features: float = 0.0
    summed: bool = False


class Autoencoding:
    """c(x, ψ(φ(x))) + λ D(p_Z, q_Z), mean over the batch (13).

    Args:
        player: the autoencoder.
        reconstruction: c.
        regulariser: D; None for a bare autoencoder.
        weight: λ.
        stride: every so many-th code alone is decoded: D sees more codes than c sees images.
        classifier: whose layers are the deep features.
    """

    def __init__(
        self,
        player: Player,
        reconstruction: Reconstruction,
        regulariser: Regulariser | None = None,
        weight: float = 1.0,
        *,
        stride: int = 1,
        classifier: Classifier | None = None,
    ) -> None:
        self.players: dict[str, Player] = {"model": player}
        self.networks: dict[str, Callable[..., Any]] = {"model": player.module}
        self.reconstruction, self.regulariser, self.weight = reconstruction, regulariser, weight
        self.stride, self.classifier = stride, classifier
        if classifier is not None:
            classifier.eval().requires_grad_(False)

    def turns(self, step: int) -> Sequence[str]:
        return ("model",)

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"].flatten(1)
        coded: Coded = self.networks["model"](x, self.stride)
        loss, scalars = self._reconstruction(x[:: self.stride], coded.raw)
        if self.regulariser is not None:
            distance = self.regulariser(coded)
            loss = loss + self.weight * distance
            scalars[self.regulariser.name] = distance.detach()
        return loss, scalars

    def _reconstruction(self, x: Tensor, raw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, and each of them as a mean over features."""
        weights = self.reconstruction
        model: Any = self.players["model"].module
        target, predicted = model.scaled(x), raw.sigmoid() if model.bounded else raw
        terms = {
            "cross_entropy": lambda: F.binary_cross_entropy_with_logits(raw, target),
            "absolute": lambda: F.l1_loss(predicted, target),
            "squared": lambda: F.mse_loss(predicted, target),
        }
        found = {name: term() for name, term in terms.items() if getattr(weights, name)}
        factor = model.n_features if weights.summed else 1
        loss = sum((factor * getattr(weights, name) * value for name, value in found.items()), raw.new_zeros(()))
        if self.classifier is not None:
            found["features"] = feature_loss(self.classifier.to(raw.device), x, model.outputs(raw))
            loss = loss + weights.features * found["features"]
        return loss, {name: value.detach() for name, value in found.items()}


class AdversarialAutoencoding(Autoencoding):
    """An autoencoder whose D is a critic f of codes (WAE-GAN; the adversarial autoencoder), which moves first.

    The critic minimises E[softplus(-f(z̃))] + E[softplus(f(φ(x)))], z̃ of the prior; the encoder λ E[softplus(-f(φ(x)))].

    Args:
        player, reconstruction, weight, options: as of `Autoencoding`.
        critic: the player; its network gives [batch, 1] for codes.
        prior: of the codes.
    """

    def __init__(
        self,
        player: Player,
        critic: Player,
        prior: Prior,
        reconstruction: Reconstruction,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(player, reconstruction, None, weight, **options)
        self.players["critic"], self.networks["critic"] = critic, critic.module
        self.prior, self.workers = prior, OverWorkers()
        self.regulariser = self

    name = "adversarial"

    def __call__(self, coded: Coded) -> Tensor:
        return F.softplus(-self.networks["critic"](coded.codes)).mean()

    def turns(self, step: int) -> Sequence[str]:
        return ("critic", "model")

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if player == "model":
            return super().loss(player, batch)
        encoder: Any = self.players["model"].module
        with torch.no_grad():
            codes = encoder.encode(batch["x"].flatten(1))
        # The same draws by N workers as by one, dealt out.
        generator, world = self.workers.generator(codes.device), self.workers.world
        drawn = self.prior.sample(len(codes) * world, generator)[self.workers.rank :: world]
        of_prior, of_codes = self.networks["critic"](torch.cat([drawn, codes])).split(len(codes))
        loss = F.softplus(-of_prior).mean() + F.softplus(of_codes).mean()
        return loss, {"gap": (of_prior.mean() - of_codes.mean()).detach()}


def feature_loss(classifier: Classifier, x: Tensor, rebuilt: Tensor) -> Tensor:
    """Σ over the classifier's hidden layers Φ of ½ mean (Φ(x) - Φ(x̂))² (Hou et al., section 3.2)."""
    with torch.no_grad():
        wanted = classifier.activations(x)
    pairs = zip(classifier.activations(rebuilt), wanted)
    return sum((F.mse_loss(found, other) / 2 for found, other in pairs), rebuilt.new_zeros(()))
