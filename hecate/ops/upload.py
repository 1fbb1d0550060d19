"""Brings small tensors from the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["upload"]


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values`, a tensor on the CPU, on `device`; the host does not wait for an accelerator.

    `Tensor.to` alone does: from memory that is not pinned it copies only when all work queued before has ended.
    """
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
