"""Bins and scores of samples that are arrays in memory: the whole evaluation from a Python prompt.

>>> bins = bins_of(real_images, BinSettings(n_bins=100))
>>> evaluation = judge_array(bins, generated_images, name="my GAN")
>>> evaluation.result.ndb
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.errors import UserError
from data.partitions import MemoryPartitions
from eval.bins import BinCounts, Bins, BinSettings, fit_bins
from eval.evaluate import Evaluation, Rule, evaluate_counts
from eval.measure import local_pass
from eval.observed import Extent, Observed, sample_ids


def bins_of(x: np.ndarray, settings: BinSettings, *, name: str = "reference", fingerprint: str | None = None) -> Bins:
    """Bins fitted to samples x [n, *shape] (any real dtype; see `fit_bins`).

    Raises:
        UserError: see `fit_bins`; or no samples of one shape.
    """
    partitions = MemoryPartitions(_numbers(x, name), name=name, scale="as given")
    return fit_bins(local_pass(partitions), [settings], name=name, fingerprint=fingerprint, n=len(x)).bins[0]


def judge_array(
    bins: Bins,
    x: np.ndarray,
    *,
    name: str = "samples",
    scale: str = "as given",
    rule: Rule | None = None,
    extras: Mapping[str, Any] | None = None,
) -> Evaluation:
    """NDB and JS of samples x [n, *shape] (see `evaluate_counts`).

    Raises:
        UserError: see `evaluate_counts`; or no samples of one shape.
    """
    partitions = MemoryPartitions(_numbers(x, name), name=name, scale=scale)
    seen = local_pass(partitions)({"extent": Extent(), "bins": BinCounts(bins)})
    return evaluate_counts(
        bins, seen["bins"], seen["extent"], name=name, scale=scale, rule=rule or Rule(), extras=extras
    )


def labels_of(bins: Bins, x: np.ndarray) -> np.ndarray:
    """The bin [n] of every sample x [n, *shape]."""
    values = _numbers(x, "samples")
    n = len(values)
    seen = Observed(values, values.reshape(n, -1), sample_ids("", n), np.arange(n))
    return bins.assign(seen)[0]


def _numbers(x: np.ndarray, name: str) -> np.ndarray:
    """Samples as contiguous float32, without a copy where they are that already."""
    try:
        values = np.ascontiguousarray(x, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: samples must be numbers of one shape: {error}") from error
    if values.ndim < 2 or 0 in values.shape:
        raise UserError(f"{name}: samples must have the shape [n, ...] and not be empty, got {list(values.shape)}")
    return values
