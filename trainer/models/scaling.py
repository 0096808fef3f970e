"""The scale on which a network sees its samples.

This file imports only torch, so that it travels with a registered model as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_and_deviation(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each [columns] float64, of samples x [n, ...] whose last axes repeat the columns.

    Images have a column per channel, other samples one per feature. A constant column has a deviation of 1.
    """
    rows = x.reshape(-1, columns).double()
    std = rows.std(0, correction=0)
    return rows.mean(0), torch.where(std > 1e-6 * rows.abs().amax(0).clamp_min(1e-30), std, torch.ones_like(std))
