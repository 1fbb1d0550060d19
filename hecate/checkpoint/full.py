"""Whole tensors from sharded ones: original names and shapes, on every rank."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.distributed.tensor import DTensor

from hecate.collectives.functional import sparse_all_gather
from hecate.collectives.transport import Transport
from hecate.placement import Placement
from hecate.runtime.pool import ExpertPool

__all__ = ["full_experts", "full_tensor"]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor, or the tensor itself, on CPU and outside autograd. Collective for DTensors."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True)


def full_experts(pool: ExpertPool, layer: int, slots: Tensor, transport: Transport | None) -> Tensor:
    """One weight kind of all experts of a layer, `[num_experts, *shape]` on CPU. Collective.

    Args:
        pool: that owns them.
        layer: its place in the pool.
        slots: `[slots, *shape]` of this device: the kind's parameter, gradient or optimizer state.
        transport: among the devices of the pool; None on one device.
    """
    rows = slots[pool.rows(layer)]
    if transport is not None:
        src = pool.placement(layer)
        everywhere = Placement(np.ones_like(src.matrix))
        gathered = sparse_all_gather(rows, src, everywhere, transport.group, transport.topology)
        assert isinstance(gathered, Tensor)
        rows = gathered
    return rows.to("cpu", copy=True)
