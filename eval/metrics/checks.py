"""What the scores ask of the arrays that they are given. Imports only NumPy; faults raise `ValueError`."""

from __future__ import annotations

import numpy as np

# Squares and cubes of products of larger values would leave the range of float64.
_MAX_MAGNITUDE = 1e37


def features(x: np.ndarray, name: str, *, least: int = 2) -> np.ndarray:
    """Feature vectors `[n, d]`: float32 and float64 as they are, other numbers as float64.

    Raises:
        ValueError: another shape, fewer than `least` rows, no column, or values that are not finite (or beyond 1e37).
    """
    values = np.asarray(x)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name}: numbers are needed, got dtype {values.dtype}")
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name}: features [n, d] are needed, got shape {values.shape}: flatten each sample")
    if len(values) < least:
        raise ValueError(f"{name}: at least {least} samples are needed, got {len(values)}: take more")
    finite(values, name)
    return values


def pair(a: np.ndarray, b: np.ndarray, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of feature vectors, `[n, d]` and `[m, d]`.

    Raises:
        ValueError: as `features`, or different numbers of features.
    """
    a, b = features(a, names[0]), features(b, names[1])
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names[0]} have {a.shape[1]} features, {names[1]} {b.shape[1]}: compute both by one feature extractor"
        )
    return a, b


def finite(values: np.ndarray, name: str) -> None:
    """Passes where every value is finite, and small enough for sums of products.

    Raises:
        ValueError: NaN, infinity, or a magnitude beyond 1e37.
    """
    # A NaN spreads to both ends, so one comparison sees every fault.
    if values.size and not (values.min() >= -_MAX_MAGNITUDE and values.max() <= _MAX_MAGNITUDE):
        raise ValueError(f"{name}: values must be finite and at most 1e37 in size: check where they come from")
