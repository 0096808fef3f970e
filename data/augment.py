"""Variants of training samples that are as likely as the samples themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.errors import UserError


def variants(x: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    """The samples [n, *shape] and their variants: for "mirror" images mirrored left to right."""
    return [x, x[:, :, ::-1]] if "mirror" in names else [x]


def augment(x: np.ndarray, names: Sequence[str], key: list[int]) -> np.ndarray:
    """A random variant of every sample, each as likely: a pure function of `key`."""
    if not names:
        return x
    choices = variants(x, names)
    chosen = np.random.default_rng(key).integers(len(choices), size=len(x))
    return np.choose(chosen.reshape(-1, *[1] * (x.ndim - 1)), choices)


def check(names: Sequence[str], shape: tuple[int, ...]) -> None:
    """Raises UserError for augmentations that samples of this shape do not admit."""
    if "mirror" in names and len(shape) not in (2, 3):
        raise UserError(f"samples of shape {list(shape)} are no images and cannot be mirrored: leave augment empty")
