"""Access to this rank's part of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["local_tensor"]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, or all of a plain tensor; outside autograd and sharing the storage."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
