"""Matrix products of training in bfloat16, where the machine has instructions for them.

This file imports only torch and the standard library, so that it travels with a registered model as it is.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_bfloat16(device_type: str) -> bool:
    """Whether this machine's CPU or GPU multiplies bfloat16 itself; emulated, it takes up to thirty times float32's."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True


def reduced_products(device_type: str, wanted: bool) -> torch.autocast:
    """A context in which matrix products and convolutions are computed in bfloat16, if it is wanted and worth it."""
    return torch.autocast(device_type, torch.bfloat16, enabled=wanted and has_bfloat16(device_type))
