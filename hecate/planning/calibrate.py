"""Further copies after the gate: the fewest that bring the true loads under the dial (paper, section 4.2)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hecate._native import few_copies as native_few_copies
from hecate.cost import LayerCost
from hecate.placement import Placement, Topology
from hecate.planning.limits import CopyLimits
from hecate.planning.plan import with_copies

__all__ = ["added", "copies_ns", "few_copies", "parts_per_million", "target_load", "tokens_ns"]

Int64 = NDArray[np.int64]

FLAT, NODES_FIRST, NODES_ONLY = range(3)  # Order in csrc/planning/few_copies.hpp


def parts_per_million(max_imbalance: float) -> int:
    """The dial as an integer, so that no float decides afterwards."""
    return round(max_imbalance * 1_000_000)


def target_load(total: int, num_devices: int, dial_ppm: int) -> int:
    """The largest device load within the dial; never below the mean rounded up."""
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
    """`placement` with the fewest further copies found that leave no device more than `target` tokens.

    Args:
        loads: int64 `[num_experts]`, true.
        placement: holders so far.
        topology: of the devices.
        limits: further copies that may enter and leave each device and node.
        target: tokens; where it cannot be reached, the least that can, to one part in a thousand or a token. The search
            tries all copies if there are few enough of devices and experts (4 and 8, say), and then misses nothing that
            some copies reach, unless sends or what crosses nodes are limited; beyond that it is a heuristic.
        prefer: "copies" for the fewest copies; "crossings" balances the nodes first and then the devices in each, so
            that few experts cross nodes; where the slots do not reach the target that way, all devices at once.
            Under limits on nodes they are always balanced first.
    """
    order = NODES_ONLY if limits.by_node else NODES_FIRST if prefer == "crossings" and topology.num_nodes > 1 else FLAT
    sides = (limits.device_in, limits.device_out, limits.node_in, limits.node_out)
    copies = native_few_copies(loads, placement.matrix, topology.devices_per_node, target, *sides, order)
    return with_copies(placement, copies)


def copies_ns(cost: LayerCost, copies: Int64, owners: Int64, topology: Topology) -> int:
    """Nanoseconds that fetching `copies` int64 `[copies, 2]` and returning their gradients takes, nothing hidden.

    The busiest device counts, as if owners sent every copy themselves; a schedule that relays is faster.
    """
    cross = copies[:, 1] // topology.devices_per_node != owners[copies[:, 0]] // topology.devices_per_node
    price = {
        crosses: cost.model.transfer_ns(cost.expert_bytes, crosses)
        + cost.model.transfer_ns(cost.gradient_bytes, crosses)
        for crosses in (False, True)
    }
    each = np.where(cross, price[True], price[False])
    busy = np.zeros((2, topology.num_devices), dtype=np.int64)
    np.add.at(busy[0], owners[copies[:, 0]], each)
    np.add.at(busy[1], copies[:, 1], each)
    return int(busy.max())


def tokens_ns(cost: LayerCost, tokens: int, topology: Topology) -> int:
    """Nanoseconds a device spends on `tokens` pairs of token and expert: compute, dispatch, combine and backward."""
    crosses = topology.num_nodes > 1
    travel = cost.model.transfer_ns(4 * tokens * cost.token_bytes, crosses) - cost.model.transfer_ns(0, crosses)
    return cost.token_ns(tokens) + travel


def added(placement: Placement, start: Placement) -> Int64:
    """Int64 `[copies, 2]` (expert, device): what `placement` has beyond `start`."""
    return np.argwhere((placement - start).matrix).astype(np.int64, copy=False)
