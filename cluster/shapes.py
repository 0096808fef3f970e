"""Samples in the shape of the reference: what can be brought to it is, and the rest is refused with the remedy."""

from __future__ import annotations

import math

from data.errors import UserError
from data.partitions import Partitions, ReshapedPartitions


def in_shape(samples: Partitions, shape: tuple[int, ...]) -> Partitions:
    """The samples in the shape of the reference; a channel axis of one is added, or left out.

    Raises:
        UserError: they are of another shape.
    """
    found = samples.shape
    if found == shape:
        return samples
    if (*found, 1) == shape or (*shape, 1) == found:
        return ReshapedPartitions(samples, shape)
    spelled = ", ".join(map(str, shape))
    if math.prod(found) == math.prod(shape):
        remedy = f"save them as x.reshape(-1, {spelled}), where their values are in that order"
    else:
        remedy = "bring them to the reference's shape"
        if options := _options(found, shape):
            remedy = f"give {options}, which shapes images in folders and tars, or {remedy}"
    raise UserError(f"{samples.name}: samples are {_spelled(found)}, but the reference is {_spelled(shape)}: {remedy}")


def _options(found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The options by which images of one shape become those of another; "" where these are none."""
    if len(found) not in (2, 3) or len(shape) not in (2, 3) or shape[0] != shape[1]:
        return ""
    channels = (*shape, 1)[2]
    if channels not in (1, 3):
        return ""
    size = [f"--size {shape[0]}"] if found[:2] != shape[:2] else []
    colours = [] if (*found, 1)[2] == channels else ["--grey" if channels == 1 else "--rgb"]
    return " ".join([*size, *colours])


def _spelled(shape: tuple[int, ...]) -> str:
    return f"[n, {', '.join(map(str, shape))}]"
