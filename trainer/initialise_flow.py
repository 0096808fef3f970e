"""Starting points of flows: the affine layer of each component from a cluster of the data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data import kmeans
from trainer.models.flow import Flow
from trainer.settings import InitialisationSettings

# Of the covariance that whitens a cluster, the part that is common to all clusters, and the smallest width of a feature
# in a cluster, relative to its width in all data (and of all data to its largest): few samples say little.
_COMMON_SHARE, _LEAST_WIDTH = 0.1, 1e-3


def initialise_flow(model: Flow, x: np.ndarray, settings: InitialisationSettings, *, seed: int) -> None:
    """Sets the affine layers and weights from x [n, d], so that the base distribution fits each cluster.

    `settings.method`:
        kmeans: K-means in the space of the data; shift and width are a cluster's mean and standard deviation, weights
            the clusters' shares. A full affine layer whitens: its triangular matrix is the inverse Cholesky factor of
            the cluster's covariance, a tenth of it that of all clusters.
        random: shifts are random samples, widths those of all data, weights equal.

    An empty cluster becomes a copy of all data with the weight of one sample.

    Raises:
        UserError: by K-means, fewer samples than components; NaN in the data.
    """
    flat = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32)
    t, d = model.n_components, model.n_features
    with torch.no_grad():
        y = model.preprocess(torch.from_numpy(flat))[0].double()
    if settings.method == "random":
        rows = np.random.default_rng(seed).choice(len(flat), t, replace=len(flat) < t)
        width = _widths(y, y).expand(t, d)
        model.set_affine(torch.full((t,), 1 / t), y[rows], width / _base_deviation(model))
        return
    labels = np.zeros(len(flat), np.int64)
    if t > 1:
        centres = kmeans.fit(
            flat,
            t,
            n_init=settings.n_init,
            max_samples=settings.kmeans_samples,
            max_dimensions=settings.kmeans_dimensions,
            seed=seed,
        )
        labels = kmeans.assign(flat[:, centres.dimensions], centres.centroids)[0]
    sizes = torch.from_numpy(np.bincount(labels, minlength=t)).double()
    clusters = [y[labels == k] if sizes[k] else y for k in range(t)]
    shift = torch.stack([members.mean(0) for members in clusters])
    width = torch.stack([_widths(members, y) for members in clusters])
    triangle = None
    if model.affine == "full":
        scaled = [(members - shift[k]) / width[k] for k, members in enumerate(clusters)]
        common = torch.stack([part.T @ part for part in scaled]).sum(0) / sum(len(part) for part in scaled)
        triangle = torch.stack([_whitening(part, common) for part in scaled])
    mixing = sizes.clamp_min(1) / sizes.clamp_min(1).sum()
    model.set_affine(mixing, shift, width / _base_deviation(model), triangle)


def _base_deviation(model: Flow) -> float:
    """The standard deviation of the base distribution: π / √3 of the logistic one."""
    return 1.0 if model.base == "gaussian" else np.pi / np.sqrt(3)


def _widths(members: Tensor, y: Tensor) -> Tensor:
    """Standard deviations of a cluster's features [d], held above a small part of those of all data."""
    overall = y.std(0, correction=0)
    overall = overall.clamp_min(_LEAST_WIDTH * float(overall.max())).clamp_min(1e-12)
    return torch.maximum(members.std(0, correction=0), _LEAST_WIDTH * overall)


def _whitening(scaled: Tensor, common: Tensor) -> Tensor:
    """The lower triangular matrix [d, d] that whitens samples of unit widths."""
    covariance = (1 - _COMMON_SHARE) * scaled.T @ scaled / len(scaled) + _COMMON_SHARE * common
    covariance.diagonal().add_(_LEAST_WIDTH)
    factor = torch.linalg.cholesky(covariance)
    return torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
