"""Divides tokens among the holders of their experts: exact min-max, or evenly as in section 4.4 of the paper."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecate._native import even_assignment, exact_assignment, within
from hecate._native import holder_loads as native_holder_loads
from hecate._native import min_max_loads as native_min_max_loads
from hecate.loads.counts import check_counts
from hecate.placement import Placement, Topology

__all__ = [
    "balanced",
    "even_pairs",
    "even_quota",
    "exact_pairs",
    "exact_quota",
    "holder_loads",
    "min_max_loads",
    "sent_rows",
]

Int64 = NDArray[np.int64]


def min_max_loads(loads: NDArray[np.int64], placement: Placement) -> NDArray[np.int64]:
    """Int64 `[rows]`: the smallest achievable maximum device load per row of `loads`, int64 `[rows, num_experts]`."""
    return native_min_max_loads(np.ascontiguousarray(loads), placement.matrix)


def holder_loads(loads: NDArray[np.int64], placement: Placement) -> NDArray[np.int64]:
    """Int64 `[pairs]`: tokens per holder with the smallest maximum device load, for `loads`, int64 `[num_experts]`."""
    return native_holder_loads(loads, placement.matrix)


def exact_quota(counts: NDArray[np.integer], placement: Placement, topology: Topology) -> NDArray[np.int64]:
    """Int64 `[num_devices, pairs]`: the quota with the smallest achievable maximum device load.

    Among all such quotas, this one keeps as many tokens as possible on their own device, and next as many as possible
    in their own node. If these two goals conflict, tokens leave their own device until at least 98 % of the tokens that
    could stay in their node do stay. Pairs are those of `placement` in ascending (expert, device) order.

    Raises:
        ValueError: `counts` is not an integer array `[num_devices, num_experts]` of non-negative numbers, or an expert
            has no holder.
    """
    return exact_assignment(*_checked(counts, placement, topology))[1]


def even_quota(counts: NDArray[np.integer], placement: Placement, topology: Topology) -> NDArray[np.int64]:
    """Int64 `[num_devices, pairs]`: the paper's dispatch (section 4.4).

    Tokens stay on their own device if it holds the expert; otherwise they are divided evenly among the holders in their
    node, or among all holders if the node has none. Each source device starts with a different holder when it
    distributes a remainder. Errors are those of `exact_quota`.
    """
    return even_assignment(*_checked(counts, placement, topology))[1]


# The functions below run between the gate and the exchange of tokens, on counts that ranks have exchanged: C-contiguous
# int64 and not negative. They check nothing.


def exact_pairs(counts: Int64, placement: Placement, topology: Topology) -> tuple[Int64, Int64]:
    """The pairs of `placement`, int64 `[pairs, 2]`, and `exact_quota` over them."""
    return exact_assignment(counts, placement.matrix, topology.devices_per_node)


def even_pairs(counts: Int64, placement: Placement, topology: Topology) -> tuple[Int64, Int64]:
    """The pairs of `placement`, int64 `[pairs, 2]`, and `even_quota` over them."""
    return even_assignment(counts, placement.matrix, topology.devices_per_node)


def sent_rows(holders: Int64, quota: Int64, num_devices: int) -> Int64:
    """Int64 `[source, destination]`: token rows that each device sends to each, itself included.

    `holders`, int64 `[pairs, 2]`, are the (expert, device) pairs of `quota`, int64 `[num_devices, pairs]`.
    """
    order = np.argsort(holders[:, 1], kind="stable")
    present, starts = np.unique(holders[order, 1], return_index=True)
    rows = np.zeros((num_devices, num_devices), dtype=np.int64)
    rows[:, present] = np.add.reduceat(quota[:, order], starts, axis=1)
    return rows


def balanced(counts: Int64, placement: Placement, dial_ppm: int) -> bool:
    """Whether these holders allow a max/mean device load of `dial_ppm` parts per million; see `target_load`."""
    return within(counts, placement.matrix, dial_ppm)


def _checked(
    counts: NDArray[np.integer], placement: Placement, topology: Topology
) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
    if placement.num_devices != topology.num_devices:
        raise ValueError(
            f"placement has {placement.num_devices} devices, topology {topology.num_devices}: they must be the same"
        )
    without = np.flatnonzero(~placement.matrix.any(axis=1))
    if without.size:
        raise ValueError(f"placement: expert {without[0]} has no holder, every expert must have its owner")
    array = check_counts(counts, placement.num_devices, placement.num_experts)
    return array, placement.matrix, topology.devices_per_node
