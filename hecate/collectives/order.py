"""The one summation order of every reduction (DESIGN, decision 2), whatever the schedule or transport.

Ranks of a node ascending, then nodes ascending; partial sums in float32 (float64 for float64); one cast at the owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

import torch
from torch import Tensor

from hecate.placement import Topology

__all__ = ["accumulation_dtype", "ordered_sum"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial sums: float32 for narrower floating-point types, else the type itself.

    Raises:
        TypeError: for bool, which has no sum of its own type.
    """
    if dtype == torch.bool:
        raise TypeError("sparse_reduce_scatter: dtype torch.bool has no sum; convert to an integer type")
    if dtype.is_floating_point and dtype != torch.float64:
        return torch.float32
    return dtype


def ordered_sum(rows: Mapping[int, Tensor], topology: Topology) -> Tensor:
    """Sum of one chunk's contributions, device -> row, in `accumulation_dtype`."""
    devices = sorted(rows)
    partial = [_sum(rows[d] for d in node) for _, node in groupby(devices, key=topology.node_of)]
    return _sum(partial)


def _sum(rows: Iterable[Tensor]) -> Tensor:
    first, *others = rows
    total = first.to(accumulation_dtype(first.dtype), copy=True)
    for row in others:
        total.add_(row)
    return total
