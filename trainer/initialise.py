"""Starting points of mixtures: K-means over a sample of the data, then one factor analysis per cluster."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data import kmeans
from data.manifest import Manifest
from data.stream import ShardStream
from trainer.models.factor_analysis import FactorAnalyser, fit_factor_analyser
from trainer.models.mfa import MFA
from trainer.settings import TRAIN_SPLIT, InitialisationSettings, TrainingSettings


def initial_rows(manifest: Manifest, training: TrainingSettings, settings: InitialisationSettings) -> np.ndarray:
    """The shuffled training samples from which a mixture is initialised, in the model's space, [n, n_features]."""
    stream = ShardStream(
        manifest,
        TRAIN_SPLIT,
        batch_size=min(settings.max_samples, manifest.n_samples(TRAIN_SPLIT)),
        seed=training.seed,
        dequantise=training.dequantises(manifest.levels),
    )
    return next(iter(stream.epoch(0)))["x"].flatten(1).numpy()


def initialise_mfa(
    model: MFA, x: np.ndarray, settings: InitialisationSettings, *, seed: int, prior_variance: Tensor | None = None
) -> None:
    """Sets the model's components from x [n, n_features] (Richardson & Weiss 2018, supplement §1.2).

    K-means, then a factor analysis of each cluster in float64; mixing coefficients are the clusters' shares.
    `settings.noise_prior_count` pseudo-samples of `prior_variance` [n_features] hold the noise variances; where
    none is given it is the average noise variance of the clusters, found by a first pass without prior. An empty
    cluster becomes a copy of the pooled data's factor analysis with the weight of one sample.

    Raises:
        UserError: fewer samples than components, or NaN in the data.
    """
    flat = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32)
    if model.n_components > 1:
        centres = kmeans.fit(
            flat,
            model.n_components,
            n_init=settings.n_init,
            max_samples=settings.kmeans_samples,
            max_dimensions=settings.kmeans_dimensions,
            seed=seed,
        )
        labels = kmeans.assign(flat[:, centres.dimensions], centres.centroids)[0]
    else:
        labels = np.zeros(len(flat), np.int64)
    count = settings.noise_prior_count
    variance = None if prior_variance is None else prior_variance.double().cpu()
    if count > 0 and variance is None:
        first = _analyse(model, flat, labels, 0.0, None, seed)
        shares = torch.from_numpy(np.bincount(labels, minlength=model.n_components) / len(flat))
        variance = shares @ torch.stack([part.noise_variance for part in first])
    parts = _analyse(model, flat, labels, count, variance, seed)
    sizes = torch.from_numpy(np.bincount(labels, minlength=model.n_components)).double().clamp_min(1)
    model.set_components(
        sizes / sizes.sum(),
        torch.stack([part.mean for part in parts]),
        torch.stack([part.factor_loadings for part in parts]),
        torch.stack([part.noise_variance for part in parts]),
    )
    if variance is not None:
        model.set_noise_prior(count, variance)


def _analyse(
    model: MFA, flat: np.ndarray, labels: np.ndarray, count: float, variance: Tensor | None, seed: int
) -> list[FactorAnalyser]:
    parts = []
    for k in range(model.n_components):
        rows = flat[labels == k]
        members = torch.from_numpy(rows if len(rows) else flat).double()
        parts.append(
            fit_factor_analyser(
                members,
                model.n_factors,
                prior_count=count,
                prior_variance=variance,
                noise_floor=model.noise_floor,
                seed=seed,
            )
        )
    return parts
