"""Random changes of training samples that leave their distribution as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.errors import UserError


def mirror(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images [n, height, width, ...], each mirrored left to right with probability one half."""
    flipped = rng.random(len(x)) < 0.5
    out = x.copy()
    out[flipped] = x[flipped, :, ::-1]
    return out


AUGMENTATIONS = {"mirror": mirror}


def augment(x: np.ndarray, names: Sequence[str], key: list[int]) -> np.ndarray:
    """The named augmentations of samples [n, *shape], one after the other: a pure function of `key`."""
    if not names:
        return x
    rng = np.random.default_rng(key)
    for name in names:
        x = AUGMENTATIONS[name](x, rng)
    return x


def check(names: Sequence[str], shape: tuple[int, ...]) -> None:
    """Raises UserError for augmentations that samples of this shape do not admit."""
    if "mirror" in names and len(shape) not in (2, 3):
        raise UserError(f"samples of shape {list(shape)} are no images and cannot be mirrored: leave augment empty")
