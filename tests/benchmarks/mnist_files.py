"""MNIST for the benchmarks, from the folder beside the repository or the one that MANYMODES_MNIST names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from data.pixels import dequantise, scale
from data.sources import SourceOptions, open_source

FOLDER = Path(os.environ.get("MANYMODES_MNIST", Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"))


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Training and test images [n, 784] uint8, in the order of the files; ends the process where there are none."""
    if not FOLDER.is_dir():
        print(f"skipped: no MNIST in {FOLDER}: name its folder in MANYMODES_MNIST")
        sys.exit(0)
    source = open_source(f"mnist:{FOLDER}", SourceOptions(shuffle=False))
    return tuple(next(source.blocks(split, 60_000))["x"].reshape(-1, 784) for split in ("train", "test"))  # type: ignore


def scaled() -> tuple[np.ndarray, np.ndarray]:
    """Training and test images in [0, 1], v / 255."""
    train, test = pixels()
    return scale(train, 256), scale(test, 256)


def dequantised(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images (v + u) / 256 in [0, 1)."""
    train, test = pixels()
    return dequantise(train, 256, [seed, 0]), dequantise(test, 256, [seed, 1])
