"""The part of a tensor that this rank has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["local_tensor"]


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank, sharing its storage and outside autograd; a plain tensor likewise."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
