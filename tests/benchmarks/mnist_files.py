"""MNIST for the benchmarks, from the folder beside the repository or the one that MANYMODES_MNIST names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from data.pixels import dequantise, scale
from data.sources import SourceOptions, open_source

FOLDER = Path(os.environ.get("MANYMODES_MNIST", Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"))


def blocks() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and test split, `x` [n, 28, 28, 1] uint8 and `label` [n], in the order of the files.

    Ends the process, with a word, where there are no files: benchmarks are run by hand, and the others go on.
    """
    if not FOLDER.is_dir():
        print(f"skipped: no MNIST in {FOLDER}: name its folder in MANYMODES_MNIST")
        sys.exit(0)
    source = open_source(f"mnist:{FOLDER}", SourceOptions(shuffle=False))
    return next(source.blocks("train", 60_000)), next(source.blocks("test", 10_000))


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Training and test images [n, 784] uint8."""
    train, test = blocks()
    return train["x"].reshape(-1, 784), test["x"].reshape(-1, 784)


def scaled() -> tuple[np.ndarray, np.ndarray]:
    """Training and test images in [0, 1], v / 255."""
    train, test = pixels()
    return scale(train, 256), scale(test, 256)


def dequantised(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images (v + u) / 256 in [0, 1)."""
    train, test = pixels()
    return dequantise(train, 256, [seed, 0]), dequantise(test, 256, [seed, 1])
