"""Gathers sharded tensors to whole ones with original shapes, on every rank."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.distributed.tensor import DTensor

from hecate.collectives.functional import start_gather
from hecate.collectives.transport import Transport
from hecate.experts import OwnedExperts
from hecate.placement import Placement

__all__ = ["full_experts", "full_tensor"]


def full_tensor(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor, on CPU and outside autograd. Collective for DTensors."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True)


def full_experts(entry: OwnedExperts, slots: Tensor, transport: Transport | None) -> Tensor:
    """One stacked weight of the model, `[num_experts, *shape]` on CPU. Collective.

    Args:
        entry: the weight, and where this device's experts are in the pool.
        slots: `[slots, *shape]` of this device: the pool's parameter, its gradient or optimizer state.
        transport: transport between the devices of the pool; None on one device.
    """
    rows = entry.of(slots)
    if transport is not None:
        everywhere = Placement(np.ones_like(entry.placement.matrix))
        rows, work = start_gather(rows, entry.placement, everywhere, transport)
        work.wait()
    return rows.to("cpu", copy=True)
