"""Copies added after the gate: the fewest that bring the true loads within `max_imbalance` (paper, section 4.2)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hecate._native import few_copies as native_few_copies
from hecate.placement import Placement, Topology
from hecate.planning.limits import CopyLimits
from hecate.planning.plan import with_copies

__all__ = ["few_copies", "parts_per_million", "target_load"]

Int64 = NDArray[np.int64]

FLAT, NODES_FIRST, NODES_ONLY = range(3)  # Order in csrc/planning/few_copies.hpp


def parts_per_million(max_imbalance: float) -> int:
    """`max_imbalance` in parts per million: all later decisions are made with integers, equal on all ranks."""
    return round(max_imbalance * 1_000_000)


def target_load(total: int, num_devices: int, dial_ppm: int) -> int:
    """The largest device load, in tokens, that the maximum imbalance allows; at least the mean load rounded up."""
    return min(total, max(total * dial_ppm // (num_devices * 1_000_000), -(-total // num_devices)))


def few_copies(
    loads: Int64,
    placement: Placement,
    topology: Topology,
    limits: CopyLimits,
    *,
    target: int,
    prefer: Literal["copies", "crossings"] = "copies",
) -> Placement:
    """Add copies to `placement`, as few as the search finds, until no device computes more than `target` tokens.

    Args:
        loads: int64 `[num_experts]`, true tokens per expert.
        placement: the holders so far.
        topology: which devices share a node.
        limits: how many further copies may enter and leave each device and node.
        target: tokens. If it cannot be reached, the search aims at the smallest load that can, to within 0.1 % or one
            token. For few devices and experts (4 and 8, for example) it tries every set of copies, and so finds any
            solution there is, unless sends or node crossings are limited. For larger problems it is a heuristic.
        prefer: "copies": use the fewest copies. "crossings": balance the nodes first and then the devices within each,
            so that few experts cross nodes; if the target cannot be reached that way, balance all devices at once.
            If crossings are limited, the nodes are always balanced first.
    """
    if not limits.device_in.any():  # else the search would prove at length that no set of no copies is enough
        return placement
    order = NODES_ONLY if limits.by_node else NODES_FIRST if prefer == "crossings" and topology.num_nodes > 1 else FLAT
    sides = (limits.device_in, limits.device_out, limits.node_in, limits.node_out)
    copies = native_few_copies(loads, placement.matrix, topology.devices_per_node, target, *sides, order)
    return with_copies(placement, copies)
