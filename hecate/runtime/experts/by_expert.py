"""Converts rows of owned experts to state dict entries, whose order does not depend on owners, and back.

In a state dict, the tensors of `num_experts` experts are one DTensor `[num_experts, ...]`, Shard(0): consecutive
experts on each device, as `torch.chunk` splits them. If owners hold the experts in another distribution,
SparseAllGather (paper, section 3.1) moves the rows; if not, nothing is sent.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as MeshPlacement

from hecate.collectives.functional import sparse_all_gather
from hecate.collectives.transport import Transport
from hecate.placement import Placement

__all__ = ["experts_of", "in_order", "misfit", "rows_of"]


def experts_of(rows: Tensor, owners: Placement, mesh: DeviceMesh | None, transport: Transport | None) -> Tensor:
    """The state dict entry for the given rows. Collective, unless `in_order(owners)`.

    Args:
        rows: `[owned, *rest]` of this device, by ascending expert id.
        owners: the owner of each of the `num_experts` experts.
        mesh: the mesh of the entry; None on one device.
        transport: transport between the owners; None on one device.

    Returns:
        DTensor `[num_experts, *rest]`; a plain tensor without a mesh. It shares memory with `rows` if nothing had to
        move, and is part of the autograd graph of `rows`.
    """
    if mesh is not None:
        rows = _moved(rows, owners, _consecutive(owners), transport)
    if not rows.requires_grad:
        rows = _by_itself(rows)
    if mesh is None:
        return rows
    shape = torch.Size((owners.num_experts, *rows.shape[1:]))
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(rows, mesh, _sharded(mesh), run_check=False, shape=shape, stride=stride)


def rows_of(
    entry: Tensor, owners: Placement, rank: int, mesh: DeviceMesh | None, transport: Transport | None
) -> Tensor:
    """The reverse of `experts_of`: rows `[owned, *rest]` of this device. Collective, unless `in_order(owners)`.

    Args:
        entry: a state dict entry for which `misfit` returns None.
        owners: the owner of each expert.
        rank: this device's rank among the owners.
        mesh: the mesh of the model; None on one device.
        transport: transport between the owners; None on one device.
    """
    if not isinstance(entry, DTensor):
        return entry.detach()[torch.from_numpy(owners.held_by(rank)).to(entry.device)]
    assert mesh is not None
    with torch.no_grad():
        local = entry.redistribute(placements=_sharded(mesh)).to_local()
    return _moved(local, _consecutive(owners), owners, transport)


def in_order(owners: Placement) -> bool:
    """Whether each device owns exactly the experts of its part of an entry, so that nothing has to move."""
    return owners == _consecutive(owners)


def misfit(entry: object, shape: torch.Size, mesh: DeviceMesh | None) -> str | None:
    """Why `rows_of` cannot take `entry` for experts of `shape` `[num_experts, *rest]`; None if it can."""
    if not isinstance(entry, Tensor):
        return f"is a {type(entry).__name__}; must be a tensor"
    if entry.shape != shape:
        return f"has shape {tuple(entry.shape)}; must be {tuple(shape)}"
    if isinstance(entry, DTensor) and entry.device_mesh != mesh:
        return f"is a DTensor on {entry.device_mesh}; must be on the model's {mesh}"
    if entry.is_meta:
        return "is on the meta device and has no values"
    return None


def _consecutive(owners: Placement) -> Placement:
    """Consecutive experts on each device, as many as `torch.chunk` gives it."""
    size = -(-owners.num_experts // owners.num_devices)
    return Placement.from_owners(np.arange(owners.num_experts) // size, owners.num_devices)


def _moved(rows: Tensor, src: Placement, dst: Placement, transport: Transport | None) -> Tensor:
    if src == dst:
        return rows
    assert transport is not None
    moved = sparse_all_gather(rows, src, dst, transport.group, transport.topology)
    assert isinstance(moved, Tensor)
    return moved


def _by_itself(rows: Tensor) -> Tensor:
    """A tensor over the same memory whose storage begins at its first row.

    `torch.save` then writes only these rows, and `deepcopy` works, which fails for DTensors with a storage offset.
    """
    if not rows.storage_offset():
        return rows
    return torch.from_dlpack(rows.detach()) if rows.numel() else rows.new_empty(rows.shape)


def _sharded(mesh: DeviceMesh) -> list[MeshPlacement]:
    return [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
