"""Random numbers that belong to whole numbers. Imports only NumPy."""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from each of `[n]` uint64.

    64 bits that look random, for consecutive numbers too; different numbers stay different.
    """
    with np.errstate(over="ignore"):
        z = numbers + GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
