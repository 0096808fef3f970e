"""Expectation-maximisation for mixtures of factor analysers: streaming, data-parallel, at the cost of one E-step.

An iteration reads the data once. The E-step finds, by matrix products over all components, the few components that
matter for each sample, and evaluates those exactly; only they enter the sufficient statistics, whose size does not
depend on the number of samples. The statistics are summed over the ranks, and every rank makes the same M-step.

References:
    Z. Ghahramani, G. Hinton, The EM Algorithm for Mixtures of Factor Analyzers, CRG-TR-96-1, 1996.
    M. Tipping, C. Bishop, Mixtures of Probabilistic Principal Component Analysers, Neural Computation 11, 1999.
    C. Liu, D. Rubin, Y. Wu, Parameter Expansion to Accelerate EM: the PX-EM Algorithm, Biometrika 85, 1998.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import SharedError
from trainer.models.mfa import MFA, Precision, log_joint_by_products, may_matter
from trainer.settings import EMSettings

# Samples that are held at once; and the products over all components, which should stay in the processor's cache.
_BLOCK_BYTES, _PRODUCT_BYTES = 32 << 20, 8 << 20
# Pairs of a sample and a component that are held at once.
_PAIR_BYTES = 64 << 20

Blocks = Iterable[Tensor]
"""Samples [n, ...] of one rank, in blocks of any size."""


@dataclass
class Statistics:
    """What an M-step needs to know of the data, about the components' present means μ; r are responsibilities.

    With u = L⁻¹ Aᵀ D⁻¹ (x - μ) the posterior of the factors is L⁻ᵀ (u + ξ), ξ standard normal (see `Precision`).
    """

    mass: Tensor  # [K] float64: Σ r
    first: Tensor  # [K, d]: Σ r (x - μ)
    second: Tensor  # [K, d]: Σ r (x - μ)², or [K, 1]: their sum over the features, for isotropic noise
    cross: Tensor  # [K, l, d]: Σ r u (x - μ)ᵀ
    totals: Tensor  # [3] float64: Σ log p(x) in nats, samples, samples for which it could be computed

    @classmethod
    def zeros(cls, model: MFA) -> Statistics:
        """No sample seen."""
        like, (k, d), columns = model.means, model.means.shape, model.log_noise_variance.shape[1]
        return cls(
            torch.zeros(k, dtype=torch.float64, device=like.device),
            like.new_zeros(k, d),
            like.new_zeros(k, columns),
            like.new_zeros(k, model.n_factors, d),
            torch.zeros(3, dtype=torch.float64, device=like.device),
        )

    def reduce(self) -> None:
        """Sums over all ranks."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in (self.mass, self.first, self.second, self.cross, self.totals):
                if tensor.numel():
                    dist.all_reduce(tensor)


@dataclass(frozen=True)
class Iteration:
    """One pass: its number (from 1), and what the E-step found before the M-step changed the model.

    `log_likelihood` is the mean log p(x) and `objective` that plus the log-prior's share, in nats per sample;
    `reseeded` components were empty and now share the place of a large one; `samples` were read, by all ranks;
    after the `last` one EM ends.
    """

    number: int
    log_likelihood: float
    objective: float
    reseeded: int
    samples: int
    last: bool


@torch.no_grad()
def fit_em(
    model: MFA,
    blocks: Callable[[], Blocks],
    settings: EMSettings,
    *,
    done: int = 0,
    previous: float | None = None,
    seed: int = 0,
    on_iteration: Callable[[Iteration], None] = lambda iteration: None,
) -> None:
    """Runs iterations done + 1 to settings.iterations, or until the objective gains less than settings.tolerance.

    The objective (log-likelihood plus log-prior) never falls but for rounding, except where an empty component is
    seeded anew, and under screening.

    Args:
        model: the start; its parameters are changed in place. Its noise prior is used.
        blocks: this rank's samples, the same ones at every call.
        settings: iterations, tolerance, screening.
        done: iterations that are already in the model.
        previous: the objective of the last of them.
        seed: chooses the features of the screening.
        on_iteration: called after each.

    Raises:
        SharedError: a log-likelihood that is not finite; on every rank.
    """
    for number in range(done, settings.iterations):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        features = _screening_features(model, settings.screening_features, generator)
        precision = model.precision(model.means.dtype)
        statistics = expectation(model, precision, blocks(), features)
        statistics.reduce()
        total, n, finite = statistics.totals.tolist()
        objective = _from_rank_zero((total + float(model.log_prior())) / max(n, 1), model.means.device)
        if finite < n or not math.isfinite(objective):
            raise SharedError(
                f"EM stopped at iteration {number + 1}: the log-likelihood of {n - finite:.0f} of {n:.0f} samples is "
                "not finite; raise model.noise_floor, or check the data"
            )
        # A component that is seeded late has no time to find its place.
        may_reseed = number < 0.7 * settings.iterations
        reseeded = maximisation(model, precision, statistics, reseed=may_reseed)
        del precision, statistics  # as large as the model each, and a checkpoint will be, too
        # Screening by other features in each pass moves the objective up and down: that is no sign of the end.
        settled = False
        if previous is not None and settings.tolerance is not None and features is None and not reseeded:
            settled = objective - previous < settings.tolerance
        last = settled or number + 1 == settings.iterations
        on_iteration(Iteration(number + 1, total / max(n, 1), objective, reseeded, int(n), last))
        if last:
            return
        previous = None if reseeded else objective


def _from_rank_zero(value: float, device: torch.device) -> float:
    """Rank 0's value on every rank: what ends the loop may not differ in the last bit."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return shared.item()


@torch.no_grad()
def expectation(model: MFA, precision: Precision, blocks: Blocks, features: Tensor | None = None) -> Statistics:
    """The E-step over one rank's samples.

    Args:
        model: the present model.
        precision: of the model, in its dtype.
        blocks: samples [n, ...] of any block size.
        features: a subset of the features by which components are screened for each sample; those within 20 nats of
            the best in it are evaluated on all features. None screens on all of them, which loses nothing.
    """
    statistics = Statistics.zeros(model)
    screen = precision if features is None else _marginal(model, features)
    rows = max(1, _BLOCK_BYTES // (model.means.element_size() * model.n_features))
    # Kept from block to block: freed and taken anew in other sizes, memory would fragment and grow.
    pairs = max(model.n_components, _PAIR_BYTES // (model.means.element_size() * model.n_features))
    work = model.means.new_empty(2, pairs, model.n_features)
    for block in _regroup(blocks, rows):
        x = block.flatten(1).to(model.means.device, model.means.dtype, non_blocking=True)
        if x.shape[1] != model.n_features:
            raise ValueError(f"samples have {x.shape[1]} features, the model has {model.n_features}")
        for part in _candidates(x, screen, features, pairs):
            _accumulate(model, precision, x, part, statistics, work)
        statistics.totals[1] += len(x)
    return statistics


def _candidates(x: Tensor, screen: Precision, features: Tensor | None, limit: int) -> Iterator[Tensor]:
    """Pairs (row, component) that matter, [n_pairs, 2], at most `limit` at once, those of a row together."""
    n_components, n_factors = screen.projected_mean.shape
    step = max(64, _PRODUCT_BYTES // (x.element_size() * n_components * (n_factors + 3)))
    held: list[Tensor] = []
    n_held = 0
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        joint, error = log_joint_by_products(rows if features is None else rows[:, features], screen)
        pairs = may_matter(joint, error).nonzero()
        pairs[:, 0] += start
        while len(pairs):
            room = max(limit - n_held, 0)
            if len(pairs) > room and n_held:
                yield torch.cat(held)
                held, n_held = [], 0
                continue
            # All pairs of a row must stay together: cut where the row changes.
            cut = len(pairs)
            if cut > limit:
                first = int(pairs[limit, 0])
                cut = int(torch.searchsorted(pairs[:, 0].contiguous(), first))
            held.append(pairs[:cut])
            n_held += cut
            pairs = pairs[cut:]
    if held:
        yield torch.cat(held)


def _accumulate(model: MFA, p: Precision, x: Tensor, pairs: Tensor, statistics: Statistics, work: Tensor) -> None:
    """Adds the samples of these pairs to the statistics: every pair is evaluated about its component's own mean."""
    pairs = pairs[pairs[:, 1].argsort(stable=True)]
    rows, of = pairs[:, 0], pairs[:, 1]
    components, counts = of.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    groups = [(k, slice(end - n, end)) for k, end, n in zip(components.tolist(), ends, counts.tolist(), strict=True)]
    centred, rest = work[0, : len(rows)], work[1, : len(rows)]
    torch.index_select(x, 0, rows, out=centred)
    u = x.new_empty(len(rows), model.n_factors)
    distance = x.new_empty(len(rows))
    isotropic = model.noise == "isotropic"
    for k, group in groups:
        centred[group] -= model.means[k]
        torch.matmul(centred[group], p.projection[k].T, out=u[group])
        # With z the posterior mean, (x - μ)ᵀ Σ⁻¹ (x - μ) = |D^-½ (x - μ - A z)|² + |z|²: nothing cancels, where the
        # difference |D^-½ (x - μ)|² - |u|² may be of much larger numbers.
        z = torch.linalg.solve_triangular(p.cholesky[k].T, u[group].T, upper=True).T
        torch.addmm(centred[group], z, model.factor_loadings[k].T, alpha=-1, out=rest[group])
        if isotropic:
            distance[group] = torch.linalg.vecdot(rest[group], rest[group]) * p.inverse_noise[k]
        else:
            distance[group] = rest[group].square_() @ p.inverse_noise[k]
        distance[group] += z.square().sum(1)
    if isotropic:
        squares = torch.linalg.vecdot(centred, centred).unsqueeze(1)
    else:
        squares = torch.mul(centred, centred, out=rest)
    joint = p.constant[of] - 0.5 * distance.double()
    top = joint.new_full((len(x),), -torch.inf).scatter_reduce_(0, rows, joint, "amax")
    weight = (joint - top[rows]).exp()
    total = torch.zeros_like(top).index_add_(0, rows, weight)
    seen = total > 0
    statistics.totals[0] += (top[seen] + total[seen].log()).sum()
    statistics.totals[2] += seen.sum()
    responsibilities = weight / total[rows]
    statistics.mass.index_add_(0, of, responsibilities)
    r = responsibilities.to(x.dtype)
    u *= r.unsqueeze(1)
    for k, group in groups:
        statistics.first[k].addmv_(centred[group].T, r[group])
        statistics.second[k].addmv_(squares[group].T, r[group])
        statistics.cross[k].addmm_(u[group].T, centred[group])


@torch.no_grad()
def maximisation(model: MFA, precision: Precision, statistics: Statistics, *, reseed: bool = True) -> int:
    """The M-step, exact for means, loadings and noise together; uses up the statistics.

    Regression of x - μ on the factors gives the loadings and, from its residuals S, the noise: D = S / N, or
    (N S + ν v) / (N + ν) under the noise prior. The factors' own mean and covariance, which the model fixes at 0
    and I, are estimated too and taken over into means and loadings (parameter expansion): as monotone as EM, and
    faster.

    Returns:
        How many empty components (less than half a sample) were seeded anew: each takes over one half of one of the
        largest components, which it leaves along their longest factor.
    """
    s, count = statistics, float(model.noise_prior_count)
    mass = s.mass.clamp_min(1e-300)
    empty = s.mass < 0.5
    repeats = model.n_features // s.second.shape[1]
    for chosen in model.component_slices():
        n = mass[chosen, None, None]
        cross, first = s.cross[chosen].double(), s.first[chosen].double()
        projection = precision.projection[chosen].double()
        # Σ r u uᵀ and Σ r u follow from the sums with x - μ, of which u is a linear map. All per unit of mass.
        uu, u = cross @ projection.mT / n, projection @ first.unsqueeze(-1) / n
        identity = torch.eye(model.n_factors, dtype=n.dtype, device=n.device)
        covariance = uu + identity - u @ u.mT
        mean = first / n.squeeze(-1)
        target = cross / n - u * mean.unsqueeze(1)
        # The factors in the coordinates of u; regressed about both means, the offset is the weighted mean of x.
        loadings = _whitened(covariance, target)
        explained = loadings.square().sum(1)
        residual = s.second[chosen].double() / n.squeeze(-1)
        if repeats == 1:
            residual = residual - mean.square() - explained
        else:
            residual = (residual - mean.square().sum(1, True) - explained.sum(1, True)) / repeats
        weight = mass[chosen, None]
        prior = count * model.noise_prior_variance[chosen].double()
        noise = (weight * residual.clamp_min(0) + prior) / (weight + count)
        keep = empty[chosen]
        old = model.noise_floor + model.log_noise_variance[chosen].double().exp()
        s.second[chosen] = torch.where(keep[:, None], old, noise).to(s.second.dtype)
        s.first[chosen] = model.means[chosen] + mean.masked_fill(keep[:, None], 0).to(s.first.dtype)
        kept = model.factor_loadings[chosen].mT
        s.cross[chosen] = torch.where(keep[:, None, None], kept, loadings.to(kept.dtype))
    mixing = s.mass / s.mass.sum()
    reseeded = _reseed(mixing, s, empty) if reseed else 0
    model.set_components(mixing, s.first, s.cross.mT, s.second)
    return reseeded


def _whitened(covariance: Tensor, target: Tensor) -> Tensor:
    """F⁻¹ target for some square root F of the covariances, whose eigenvalues are one or above but for rounding."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not bool(failed.any()):
        return torch.linalg.solve_triangular(factor, target, upper=False)
    values, vectors = torch.linalg.eigh(covariance)
    least = (values[..., -1:] * torch.finfo(values.dtype).eps * values.shape[-1]).clamp_min(1.0)
    return (vectors.mT @ target) / torch.maximum(values, least).sqrt().unsqueeze(-1)


def _reseed(mixing: Tensor, s: Statistics, empty: Tensor) -> int:
    """Splits the largest components in two, one for each empty one; a component must have two samples to be split."""
    places = empty.nonzero().squeeze(1).tolist()
    largest = s.mass.argsort(descending=True, stable=True).tolist()
    reseeded = 0
    for k, j in zip(places, largest, strict=False):
        if s.mass[j] < 2:
            break
        shift = s.second[j].expand_as(s.first[j]).clamp_min(0).sqrt()
        if s.cross.shape[1]:
            longest = int(s.cross[j].square().sum(1).argmax())
            shift = torch.maximum(s.cross[j, longest].abs(), shift * 0.1).copysign(s.cross[j, longest])
        s.first[k], s.second[k], s.cross[k] = s.first[j] + 0.5 * shift, s.second[j], s.cross[j]
        s.first[j] -= 0.5 * shift
        mixing[k] = mixing[j] = mixing[j] / 2
        reseeded += 1
    return reseeded


def _marginal(model: MFA, features: Tensor) -> Precision:
    """The precision of the model's marginal over some features: a mixture of factor analysers again."""
    part = MFA(model.n_components, len(features), model.n_factors, model.noise_floor, model.noise)
    part.to(model.means.device, model.means.dtype)
    part.set_components(
        model.mixing_coefficients,
        model.means[:, features],
        model.factor_loadings[:, features],
        model.noise_variance[:, features],
    )
    return part.precision(model.means.dtype)


def _screening_features(model: MFA, number: int | None, generator: torch.Generator) -> Tensor | None:
    if number is None or number >= model.n_features:
        return None
    return torch.randperm(model.n_features, generator=generator)[:number].sort().values.to(model.means.device)


def _regroup(blocks: Blocks, rows: int) -> Iterator[Tensor]:
    """The same samples in blocks of about `rows`."""
    held: list[Tensor] = []
    n = 0
    for block in blocks:
        for part in block.split(rows):
            if n and n + len(part) > rows:
                yield torch.cat(held) if len(held) > 1 else held[0]
                held, n = [], 0
            held.append(part)
            n += len(part)
    if held:
        yield torch.cat(held) if len(held) > 1 else held[0]
