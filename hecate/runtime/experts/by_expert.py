"""Experts in one order for state dicts, whoever owns them.

In a state dict, what `num_experts` experts have is one DTensor `[num_experts, ...]`, Shard(0): consecutive experts on
each device, as `torch.chunk` cuts them. Owners have the same rows elsewhere; the two are brought together by
SparseAllGather (paper, section 3.1), and not at all if they agree.
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
    """The entry of a state dict. Collective, unless owners have consecutive experts as the entry does.

    Args:
        rows: `[owned, *rest]` of this device, ascending expert id.
        owners: of `num_experts` experts.
        mesh: of the entry; None without one.
        transport: among the owners; None without a mesh.

    Returns:
        DTensor `[num_experts, *rest]`; a plain tensor without a mesh. It shares memory with `rows` if nothing had to
        move, and is of the graph of `rows`.
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
    """The reverse of `experts_of`: `[owned, *rest]` of device `rank`. Collective likewise.

    Args:
        entry: as `misfit` has nothing against.
        owners: of its experts.
        rank: of this device among the owners.
        mesh: of the model.
        transport: as there.
    """
    if not isinstance(entry, DTensor):
        return entry.detach()[torch.from_numpy(owners.held_by(rank)).to(entry.device)]
    assert mesh is not None
    with torch.no_grad():
        local = entry.redistribute(placements=_sharded(mesh)).to_local()
    return _moved(local, _consecutive(owners), owners, transport)


def in_order(owners: Placement) -> bool:
    """Whether each device owns what it has of an entry, so that nothing need move."""
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
    """As many experts a device as `torch.chunk` gives it."""
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
    """The same memory as a storage that begins there.

    Then `torch.save` writes these rows alone, and `deepcopy`, which fails for DTensors further on in a storage, works.
    """
    if not rows.storage_offset():
        return rows
    return torch.from_dlpack(rows.detach()) if rows.numel() else rows.new_empty(rows.shape)


def _sharded(mesh: DeviceMesh) -> list[MeshPlacement]:
    return [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
