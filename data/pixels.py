"""From stored pixels to the scales of models and scores, and back."""

from __future__ import annotations

import numpy as np


def scale(x: np.ndarray, levels: int | None) -> np.ndarray:
    """float32: v / (levels - 1) in [0, 1] for pixels, real numbers as they are."""
    if levels is None:
        return x.astype(np.float32, copy=False)
    return np.divide(x, np.float32(levels - 1), dtype=np.float32)


def dequantise(x: np.ndarray, levels: int, key: list[int]) -> np.ndarray:
    """float32 (v + u) / levels in [0, 1) with u uniform in [0, 1), a pure function of `key`.

    u is a multiple of 2**-16: with 8 bits of pixel the sum fits float32's 24 bits. With a finer u the sum would be
    rounded, sometimes up to the next level, and for the brightest pixel up to 1.
    """
    draw = np.random.Generator(np.random.SFC64(key)).bytes(2 * x.size)
    out = np.frombuffer(draw, "<u2").reshape(x.shape).astype(np.float32)
    out *= np.float32(2**-16)
    out += x
    out *= np.float32(1 / levels)
    return out


def quantise(x: np.ndarray, levels: int | None) -> np.ndarray:
    """A density model's samples (v + u) / levels as pixels v / (levels - 1), float32 in [0, 1].

    A density of dequantised pixels stands for the pixels v = floor(levels x): put back on the grid (and clipped to
    it), samples compare with real images, which are on it too. Real numbers (levels None) stay as they are.
    """
    if levels is None:
        return x.astype(np.float32, copy=False)
    return np.clip(np.floor(x * levels), 0, levels - 1).astype(np.float32) / np.float32(levels - 1)
