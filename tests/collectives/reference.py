"""Slow, obvious numpy versions of the two collectives, and input data that every rank can compute for all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.placement import Placement, Topology


@dataclass(frozen=True)
class Case:
    """One call: `src` has one device per expert, `dst` is any placement; the reduction goes from `dst` to `src`."""

    src: Placement
    dst: Placement
    topology: Topology
    chunk: tuple[int, ...]
    seed: int

    @classmethod
    def random(cls, devices: int, per_node: int, seed: int) -> Case:
        """Cases with devices that own nothing, and experts held by their owner only, by all, or by others only."""
        rng = np.random.default_rng([devices, per_node, seed])
        experts = int(rng.integers(1, 9))
        src = Placement.from_owners(rng.integers(0, devices, experts), devices)
        dst = rng.random((experts, devices)) < rng.choice([0.0, 0.3, 0.7, 1.0], (experts, 1))
        if seed % 3:
            dst |= src.matrix
        chunk = [(), (1,), (7,), (3, 5), (1025,)][int(rng.integers(5))]
        return cls(src, Placement(dst), Topology(devices, per_node), chunk, seed)

    def row(self, expert: int, device: int, dtype: torch.dtype) -> Tensor:
        """The row of `expert` on `device`. Magnitudes differ widely, so that a wrong order of summation shows."""
        rng = np.random.default_rng([self.seed, expert, device])
        values = rng.standard_normal(self.chunk) * 10.0 ** rng.integers(-3, 4, self.chunk)
        return torch.as_tensor(values if dtype.is_floating_point else values * 100).to(dtype)

    def rows(self, placement: Placement, device: int, dtype: torch.dtype) -> Tensor:
        """`[experts that placement gives device, *chunk]`."""
        held = [self.row(e, device, dtype) for e in placement.held_by(device).tolist()]
        return torch.stack(held) if held else torch.empty(0, *self.chunk, dtype=dtype)


def gathered(case: Case, device: int, dtype: torch.dtype) -> Tensor:
    """What SparseAllGather from `src` to `dst` leaves on `device`."""
    owners = case.src.owners
    held = [case.row(e, int(owners[e]), dtype) for e in case.dst.held_by(device).tolist()]
    return torch.stack(held) if held else torch.empty(0, *case.chunk, dtype=dtype)


def reduced(case: Case, device: int, dtype: torch.dtype) -> Tensor:
    """What SparseReduceScatter from `dst` to `src` leaves on `device`: node by node, one cast at the end."""
    held = [_sum(case, e, dtype) for e in case.src.held_by(device).tolist()]
    return torch.stack(held) if held else torch.empty(0, *case.chunk, dtype=dtype)


def _sum(case: Case, expert: int, dtype: torch.dtype) -> Tensor:
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(dtype, dtype)
    nodes: list[NDArray] = []
    for node in range(case.topology.num_nodes):
        devices = [d for d in case.dst.holders_of(expert).tolist() if case.topology.node_of(d) == node]
        rows = [case.row(expert, d, dtype).to(wide).numpy() for d in devices]
        if rows:
            nodes.append(_fold(rows))
    total = _fold(nodes) if nodes else torch.zeros(case.chunk, dtype=wide).numpy()
    return torch.as_tensor(total).to(dtype)


def _fold(rows: list[NDArray]) -> NDArray:
    total = rows[0].copy()
    for row in rows[1:]:
        total = total + row
    return total
