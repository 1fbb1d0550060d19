"""The dispatch by kernels whose sizes the host does not know, so that no layer waits for its counts.

The quota is computed on the device, bit by bit as on the host, and so is where every row goes. An exchange has a fixed
number of rows per pair of ranks; what is not used of it has no meaning and is never read. Sums and products have the
same terms in the same order as those of `kernel_dispatch`.

Shapes: D devices, E experts, P (expert, device) pairs, L experts held here, C rows per pair of ranks, M = D * C rows
that arrive, N = D * C rows that leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from hecate.ops.kernels.launch import to_device
from hecate.ops.kernels.quota import QuotaProblem
from hecate.ops.kernels.registered import exact_quota, sort_copies
from hecate.ops.kernels.tokens import ExpertCounts
from hecate.placement import Placement, Topology
from hecate.planning.plan import Plan
from hecate.planning.quota import sent_rows
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.by_kernels import KernelDispatch

__all__ = ["DeviceDispatch", "check_capacity", "device_dispatch"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """What depends on a placement alone, on the device.

    Attributes:
        problem: of the quota; None on one device, where each expert has one holder.
        first: int64 `[E + 1]`, the pairs of expert e are `[first[e], first[e + 1])`.
        opens: int64 `[P]`, the first pair of the same expert.
        wire: int64 `[P]`, the pairs by device, then by expert.
        wire_opens: int64 `[P]`, of each of these the position of the first pair of the same device.
        wire_begins: int64 `[P]`, the first row of that device.
        here: int64 `[L]`, this device's pairs, ascending.
        rows: int64 `[L]`, of the experts' rows in their order, the position in `here`.
        sources: int64 `[D]`, the first row that comes from each device.
    """

    problem: QuotaProblem | None
    first: Tensor
    opens: Tensor
    wire: Tensor
    wire_opens: Tensor
    wire_begins: Tensor
    here: Tensor
    rows: Tensor
    sources: Tensor


@lru_cache(maxsize=256)
def _pairs(
    placement: Placement,
    topology: Topology,
    rank: int,
    local_rows: tuple[int, ...],
    capacity: int,
    device: torch.device,
) -> Pairs:
    """The tables of `placement`; the host does not wait for `device`."""
    expert, holder = np.nonzero(placement.matrix)
    first = np.searchsorted(expert, np.arange(placement.num_experts + 1))
    wire = np.lexsort((expert, holder))
    wire_opens = np.searchsorted(holder[wire], holder[wire])
    here = np.flatnonzero(holder == rank)
    rows = np.searchsorted(expert[here], np.array(local_rows, dtype=np.int64))
    begins = np.arange(topology.num_devices) * capacity
    tables = (first, first[expert], wire, wire_opens, holder[wire] * capacity, here, rows, begins)
    parts = to_device(np.concatenate(tables), device).split([len(table) for table in tables])
    problem = None if topology.num_devices == 1 else QuotaProblem.of(placement, topology, device)
    return Pairs(problem, *parts)


@dataclass(frozen=True, eq=False)
class DeviceDispatch(KernelDispatch):
    """See the top of the file. In `sent` and `received` every number is C; `blocks` only says whether rows are sorted.

    Attributes:
        arrivals: int64 `[M]`, the received row of each row by expert; M for those that have no meaning. None: rows
            arrive in their order.
    """

    arrivals: Tensor | None
    ends: Tensor

    @cached_property
    def local_order(self) -> Tensor | None:
        """int64 `[M]`, as `Straight.local_order`; rows without a meaning get some row, another device's if possible."""
        if self.arrivals is None:
            return None
        elsewhere = self.received[0] if self.comms.rank == 0 and len(self.received) > 1 else 0
        return self.arrivals.masked_fill(self.arrivals == len(self.arrivals), elsewhere)

    @cached_property
    def local_inverse(self) -> Tensor | None:
        """int64 `[M]`, the row by expert of each received row; some row for those without a meaning."""
        if self.arrivals is None:
            return None
        rows = len(self.arrivals)
        inverse = self.arrivals.new_zeros(rows + 1)
        return inverse.scatter_(0, self.arrivals, torch.arange(rows, device=inverse.device))[:rows]


def device_dispatch(
    placement: Placement,
    counts: Tensor,
    index: Tensor,
    comms: Comms,
    local_rows: Sequence[int],
    dtype: torch.dtype,
    wire: torch.dtype | None,
    counted: ExpertCounts,
    capacity: int | None,
) -> DeviceDispatch:
    """Make this device's dispatch by the exact quota. The host does not wait.

    Args:
        placement: which devices hold which experts.
        counts: int64 `[D, E]`, contiguous, on the device: tokens of each device for each expert.
        index: `[T, k]` expert of each token copy; -1: none.
        comms: this device's process groups and topology.
        local_rows: experts held here, in the order of their rows.
        dtype: dtype in which the experts compute.
        wire: dtype of rows between devices; None keeps theirs.
        counted: `count_experts(index)`.
        capacity: C. If the quota asks for more, results are wrong, but no memory is written or read out of bounds: the
            host has to find out later (`check_capacity`). On one device it is T * k, whatever is given.
    """
    devices, rank, alone = comms.topology.num_devices, comms.rank, comms.topology.num_devices == 1
    capacity = index.numel() if alone or capacity is None else capacity
    pairs = _pairs(placement, comms.topology, rank, tuple(local_rows), 0 if alone else capacity, index.device)
    quota = counts if pairs.problem is None else exact_quota(counts, pairs.problem)[0]
    before, start = _departures(pairs, quota[rank])
    order, inverse = sort_copies(index, counted, pairs.first, before, start, devices * capacity)
    blocks, sizes = _arriving(pairs, quota, capacity)
    ends = sizes.view(-1, devices).sum(1).cumsum(0).clamp_(max=devices * capacity).to(torch.int32)
    in_order = alone and list(local_rows) == sorted(local_rows)
    arrivals = None if in_order else _arrivals(blocks, sizes, devices * capacity)
    each, travels = (capacity,) * devices, dtype if alone else wire or dtype
    top_k = index.shape[1]
    return DeviceDispatch(order, each, each, arrivals, (), top_k, comms, inverse, dtype, travels, arrivals, ends)


def check_capacity(layer: str, plan: Plan, capacity: int | None) -> None:
    """RuntimeError if `plan` sends more rows from one device to another than `device_dispatch` had room for."""
    devices = plan.topology.num_devices
    if capacity is None or devices == 1:
        return
    sent = sent_rows(plan.holders, plan.quota, devices)
    if (most := int(sent.max())) > capacity:
        source, target = np.unravel_index(int(sent.argmax()), sent.shape)
        raise RuntimeError(
            f"{layer}: rank {source} had {most} rows for rank {target}, FSSDPConfig.rows_per_pair={capacity}; it must "
            'be at least as large. This pass has added nothing to gradients: raise it, or use splits="host"'
        )


def _departures(pairs: Pairs, share: Tensor) -> tuple[Tensor, Tensor]:
    """`before` and `start` of `sort_copies`, int64 `[P]` each, for this device's row of the quota."""
    earlier = share.cumsum(0) - share
    before = earlier - earlier[pairs.opens]
    sent = share[pairs.wire]
    place = sent.cumsum(0) - sent
    return before, torch.empty_like(share).scatter_(0, pairs.wire, place - place[pairs.wire_opens] + pairs.wire_begins)


def _arriving(pairs: Pairs, quota: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Blocks of received rows in the order by (row of the expert here, source).

    Returns:
        int64 `[2, L * D]`, the first row of each and the last row that comes from its source; and `[L * D]`, sizes.
    """
    sizes = quota[:, pairs.here]  # as they come: by source, then by expert
    sources = pairs.sources.unsqueeze(1)
    begins = sizes.cumsum(1) - sizes + sources
    lasts = (sources + capacity - 1).expand_as(sizes)
    begins, lasts, sizes = (x[:, pairs.rows].t().flatten() for x in (begins, lasts, sizes))
    return torch.stack([begins, lasts]), sizes


def _arrivals(blocks: Tensor, sizes: Tensor, rows: int) -> Tensor:
    """See `DeviceDispatch.arrivals`."""
    ends, row = sizes.cumsum(0), torch.arange(rows, device=sizes.device)
    block = torch.searchsorted(ends, row, right=True)  # their number for rows behind the last one
    shift = torch.cat([blocks[0] - ends + sizes, ends.new_full((1,), rows)])[block]
    last = torch.cat([blocks[1], ends.new_full((1,), rows)])[block]
    return torch.minimum(row + shift, last)
