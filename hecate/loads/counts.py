"""Checks token counts: how many tokens each device routes to each expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["check_counts"]

MAX_TOKENS = 2**40


def check_counts(counts: object, num_devices: int, num_experts: int) -> NDArray[np.int64]:
    """`counts` as C-contiguous int64 `[num_devices, num_experts]`; otherwise ValueError with the value and the rule."""
    array = np.asarray(counts)
    if array.shape != (num_devices, num_experts) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"counts: shape {array.shape}, dtype {array.dtype}; must be integers of shape "
            f"[num_devices={num_devices}, num_experts={num_experts}]"
        )
    array = np.ascontiguousarray(array, dtype=np.int64)
    if array.size and array.min() < 0:
        device, expert = np.argwhere(array < 0)[0]
        raise ValueError(f"counts: {array[device, expert]} tokens of device {device} for expert {expert}, must be >= 0")
    if array.size and (array.max() > MAX_TOKENS or array.sum() > MAX_TOKENS):
        raise ValueError(f"counts: {array.sum(dtype=object)} tokens in total, must be <= 2**40")
    return array
