"""Starting points: of mixtures clusters of a sample of the data, and a factor analysis of each; of networks a scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import kmeans
from data.errors import UserError
from data.manifest import Manifest
from data.stream import ShardStream
from trainer.models.factor_analysis import FactorAnalyser, fit_factor_analyser
from trainer.models.mfa import MFA
from trainer.settings import TRAIN_SPLIT, InitialisationSettings, TrainingSettings

_COMPARED_SAMPLES = 10_000  # by which starting points are compared
_SUBSPACE_ROUNDS = 3
# What mean and standard deviation of a network's inputs are taken from.
_SCALED_BYTES, _FEWEST_SCALED = 64 << 20, 256
# Of the prior's variances under smoothing, the part that is common to all components, and in it to all features: a
# feature that is constant in one component's samples, or in all, may still differ in a sample to come.
_COMMON_SHARE, _FLAT_SHARE = 0.1, 0.01


def initial_rows(manifest: Manifest, training: TrainingSettings, settings: InitialisationSettings) -> np.ndarray:
    """The shuffled training samples from which a mixture is initialised, in the model's space, [n, n_features]."""
    stream = ShardStream(
        manifest,
        TRAIN_SPLIT,
        batch_size=min(settings.max_samples, manifest.n_samples(TRAIN_SPLIT)),
        seed=training.seed,
        dequantise=training.dequantises(manifest.levels),
        augment=training.augment,
    )
    return next(iter(stream.epoch(0)))["x"].flatten(1).numpy()


def rows_for_scale(manifest: Manifest, training: TrainingSettings, settings: InitialisationSettings) -> Tensor:
    """Some training samples [n, d], enough for the scale that a network sees them on."""
    few = max(_FEWEST_SCALED, _SCALED_BYTES // (4 * math.prod(manifest.shape)))
    return torch.from_numpy(initial_rows(manifest, training, settings.model_copy(update={"max_samples": few})))


def initialise_scale(
    model: Any, manifest: Manifest, training: TrainingSettings, settings: InitialisationSettings
) -> None:
    """Gives a network (`set_scale`) mean and standard deviation of some training samples."""
    model.set_scale(rows_for_scale(manifest, training, settings))


def initialise_mfa(
    model: MFA,
    x: np.ndarray,
    settings: InitialisationSettings,
    *,
    seed: int,
    shape: tuple[int, ...] | None = None,
    prior_variance: Tensor | None = None,
) -> None:
    """Sets the model's components from x [n, n_features] (Richardson & Weiss 2018, supplement §1.2).

    `settings.method`:
        kmeans: K-means, then a factor analysis of each cluster; mixing coefficients are the clusters' shares.
        random: n_factors + 1 random samples per component; they span its subspace, and the noise is constant, the
            average variance of a feature.
        k-subspaces: such random subspaces, refined by the samples that are closest to each, of which there is a
            factor analysis in the end.

    Of `settings.n_starts` such starting points the one with the highest likelihood is taken.

    `settings.noise_prior_count` pseudo-samples hold the noise variances, also in training. Their variances are
    `prior_variance` [n_features] where it is given; else the clusters' average noise variances, found by a first
    analysis without prior (for `random`: those of all samples together); with `settings.noise_prior_smoothing` each
    component's own, blurred over the image, and a tenth of that average. An empty cluster becomes a copy of the pooled
    data's factor analysis with the weight of one sample.

    Args:
        model: its size decides how many components are made.
        x: samples.
        settings: how.
        seed: fixes every random choice.
        shape: of a sample, for the smoothing; None where it is no image.
        prior_variance: see above.

    Raises:
        UserError: fewer samples than components, or NaN in the data.
    """
    flat = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32)
    if len(flat) < model.n_components:
        raise UserError(
            f"a mixture of {model.n_components} components cannot start from {len(flat)} samples: lower "
            "n_components, or give more samples"
        )
    compared = torch.from_numpy(flat[:_COMPARED_SAMPLES]).to(model.means)
    best: tuple[float, dict[str, Tensor]] | None = None
    for start in range(settings.n_starts):
        _start(model, flat, settings, seed + 7919 * start, shape, prior_variance)
        if settings.n_starts == 1:
            return
        with torch.no_grad():
            reached = sum(float(model.log_prob(part).double().sum()) for part in compared.split(1000))
            reached += float(model.log_prior()) * len(compared) / len(flat)
        if best is None or reached > best[0]:
            best = reached, {name: value.clone() for name, value in model.state_dict().items()}
    assert best is not None
    model.load_state_dict(best[1])


def _start(
    model: MFA,
    flat: np.ndarray,
    settings: InitialisationSettings,
    seed: int,
    shape: tuple[int, ...] | None,
    prior_variance: Tensor | None,
) -> None:
    if settings.method == "kmeans":
        clusters = _kmeans_clusters(model, flat, settings, seed)
    else:
        clusters = _random_clusters(model, flat, seed)
        if settings.method == "k-subspaces":
            clusters = _nearest_subspaces(model, flat, clusters, seed)
    sizes = torch.tensor([len(rows) for rows in clusters], dtype=torch.float64)
    mixing = sizes.clamp_min(1) / sizes.clamp_min(1).sum()
    constant = torch.from_numpy(flat.var(0, dtype=np.float64)).mean() if settings.method == "random" else None
    count = settings.noise_prior_count
    variance = None if prior_variance is None else prior_variance.double().cpu()
    if count > 0 and variance is None:
        # It is the scale of the noise that counts here, not its last digit.
        if constant is None:
            noise = _analyse(model, flat, clusters, 0.0, None, None, seed, n_iterations=10).noise_variance
        else:  # a few random samples tell nothing of the noise within components
            pooled = torch.from_numpy(flat[:_COMPARED_SAMPLES]).double()
            noise = fit_factor_analyser(pooled, model.n_factors, n_iterations=10, seed=seed).noise_variance[None]
            noise = noise.expand(model.n_components, -1)
        variance = _prior_variance(noise.double(), mixing, settings.noise_prior_smoothing, shape)
    if settings.method == "random":
        mixing = torch.full_like(mixing, 1 / len(mixing))
    model.set_components(mixing, *_analyse(model, flat, clusters, count, variance, constant, seed))
    if variance is not None:
        model.set_noise_prior(count, variance)


def _kmeans_clusters(model: MFA, flat: np.ndarray, settings: InitialisationSettings, seed: int) -> list[np.ndarray]:
    if model.n_components == 1:
        return [np.arange(len(flat))]
    centres = kmeans.fit(
        flat,
        model.n_components,
        n_init=settings.n_init,
        max_samples=settings.kmeans_samples,
        max_dimensions=settings.kmeans_dimensions,
        seed=seed,
    )
    return _members(kmeans.assign(flat[:, centres.dimensions], centres.centroids)[0], model.n_components)


def _members(labels: np.ndarray, n_clusters: int) -> list[np.ndarray]:
    """Row numbers of each cluster, ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=n_clusters))[:-1])


def _random_clusters(model: MFA, flat: np.ndarray, seed: int) -> list[np.ndarray]:
    """n_factors + 1 different samples per component (all of them, where there are fewer)."""
    rng, size = np.random.default_rng(seed), min(model.n_factors + 1, len(flat))
    return [rng.choice(len(flat), size, replace=False) for _ in range(model.n_components)]


def _nearest_subspaces(model: MFA, flat: np.ndarray, clusters: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Lloyd's algorithm with subspaces for centres: each sample goes to the one that it is closest to.

    A component that attracts no more samples than it has factors keeps its seed.
    """
    x = torch.from_numpy(flat)
    for _ in range(_SUBSPACE_ROUNDS):
        distances = []
        for rows in clusters:
            mean = x[rows].mean(0)
            rank = min(model.n_factors, len(rows) - 1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                q = min(rank + 4, len(rows), x.shape[1])
                basis = torch.svd_lowrank(x[rows] - mean, q=q)[2][:, :rank] if rank > 0 else x.new_zeros(x.shape[1], 0)
            centred = x - mean
            distances.append(centred.square().sum(1) - (centred @ basis).square().sum(1))
        found = _members(torch.stack(distances).argmin(0).numpy(), model.n_components)
        clusters = [new if len(new) > model.n_factors else old for new, old in zip(found, clusters, strict=True)]
    return clusters


def _prior_variance(noise: Tensor, shares: Tensor, smoothing: float, shape: tuple[int, ...] | None) -> Tensor:
    """Variances of the noise prior from the clusters' own [K, d]: [d], or [K, d] with smoothing."""
    common = shares @ noise
    if not smoothing:
        return common
    common = (1 - _FLAT_SHARE) * _blurred(common[None], smoothing, shape) + _FLAT_SHARE * common.mean()
    return (1 - _COMMON_SHARE) * _blurred(noise, smoothing, shape) + _COMMON_SHARE * common


def _blurred(x: Tensor, width: float, shape: tuple[int, ...] | None) -> Tensor:
    """Rows [n, d] blurred along height and width, where `shape` is that of an image."""
    if shape is None or len(shape) not in (2, 3):
        return x
    from scipy.ndimage import gaussian_filter

    sigma = (0.0, width, width, 0.0)[: 1 + len(shape)]
    blurred = gaussian_filter(x.numpy().reshape(len(x), *shape), sigma, mode="nearest")
    return torch.from_numpy(blurred.reshape(len(x), -1))


def _analyse(
    model: MFA,
    flat: np.ndarray,
    clusters: list[np.ndarray],
    count: float,
    variance: Tensor | None,
    constant_noise: Tensor | None,
    seed: int,
    n_iterations: int = 30,
) -> FactorAnalyser:
    """A factor analysis per cluster, computed in float64; all of them stacked along the first axis."""
    means = torch.zeros(model.n_components, model.n_features, dtype=model.means.dtype)
    found = FactorAnalyser(means, means.new_zeros(*means.shape, model.n_factors), torch.zeros_like(means))
    for k, rows in enumerate(clusters):
        members = torch.from_numpy(flat[rows] if len(rows) else flat).double()
        part = fit_factor_analyser(
            members,
            model.n_factors,
            prior_count=count,
            prior_variance=variance[k] if variance is not None and variance.ndim == 2 else variance,
            noise_floor=model.noise_floor,
            isotropic=model.noise == "isotropic",
            n_iterations=n_iterations if constant_noise is None else 0,
            seed=seed,
        )
        if constant_noise is not None:
            noise = constant_noise.clamp_min(model.noise_floor)
            part = part._replace(noise_variance=noise.expand_as(part.noise_variance))
        for stacked, values in zip(found, part, strict=True):
            stacked[k] = values
    return found
