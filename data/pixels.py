"""From stored pixels to the scales of models and scores, and back."""

from __future__ import annotations

import numpy as np


def quantise(x: np.ndarray, levels: int | None) -> np.ndarray:
    """A density model's samples (v + u) / levels as pixels v / (levels - 1), float32 in [0, 1].

    A density of dequantised pixels stands for the pixels v = floor(levels x): put back on the grid (and clipped to
    it), samples compare with real images, which are on it too. Real numbers (levels None) stay as they are.
    """
    if levels is None:
        return x.astype(np.float32, copy=False)
    return np.clip(np.floor(x * levels), 0, levels - 1).astype(np.float32) / np.float32(levels - 1)
