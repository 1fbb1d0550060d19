"""How long copies and tokens take, by the cost model: what policies weigh against each other (paper, section 4.2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecate.cost import LayerCost
from hecate.placement import Placement, Topology
from hecate.planning.quota import exact_pairs, sent_rows

__all__ = ["copies_ns", "layer_ns", "tokens_ns"]

Int64 = NDArray[np.int64]


def copies_ns(cost: LayerCost, copies: Int64, owners: Int64, topology: Topology) -> int:
    """Nanoseconds to fetch `copies`, int64 `[copies, 2]` (expert, device), and to return their gradients, not hidden.

    This is the time of the busiest device if holders relay, as routes do (`collectives/route.py`): an expert leaves its
    owner once and enters each other node once. Routes come within some 20 % of it.
    """
    if not len(copies):
        return 0
    experts, devices = copies.T
    node, home = devices // topology.devices_per_node, owners[experts] // topology.devices_per_node
    first = np.zeros(len(copies), dtype=bool)
    first[np.unique(experts * topology.num_nodes + node, return_index=True)[1]] = True
    each = np.where(first & (node != home), _copy_ns(cost, True), _copy_ns(cost, False))
    received, sent = np.zeros(topology.num_devices, dtype=np.int64), np.zeros(len(owners), dtype=np.int64)
    np.add.at(received, devices, each)
    np.maximum.at(sent, experts, each)
    sending = np.zeros_like(received)
    np.add.at(sending, owners, sent)
    return int(max(received.max(), sending.max()))


def _copy_ns(cost: LayerCost, crosses: bool) -> int:
    return cost.model.transfer_ns(cost.expert_bytes, crosses) + cost.model.transfer_ns(cost.gradient_bytes, crosses)


def tokens_ns(cost: LayerCost, tokens: int, topology: Topology) -> int:
    """Nanoseconds that a device needs for `tokens` (token, expert) pairs: compute, dispatch, combine and backward."""
    return cost.token_ns(tokens) + _travel_ns(cost, tokens, topology.num_nodes > 1)


def _travel_ns(cost: LayerCost, tokens: int, crosses: bool) -> int:
    return cost.model.transfer_ns(4 * tokens * cost.token_bytes, crosses) - cost.model.transfer_ns(0, crosses)


def layer_ns(cost: LayerCost, counts: Int64, placement: Placement, topology: Topology, largest: int) -> int:
    """Nanoseconds of a layer, forward and backward: the busiest device computes, the busiest link between nodes sends.

    Args:
        cost: of the layer.
        counts: int64 `[num_devices, num_experts]`, tokens by the device they come from.
        placement: which devices hold each expert.
        topology: which devices share a node.
        largest: tokens of the busiest device.
    """
    holders, quota = exact_pairs(counts, placement, topology)
    rows = sent_rows(holders, quota, topology.num_devices)
    nodes = np.arange(topology.num_devices) // topology.devices_per_node
    rows[nodes[:, None] == nodes] = 0
    crossing = int(max(rows.sum(axis=0).max(), rows.sum(axis=1).max()))
    return cost.token_ns(largest) + _travel_ns(cost, crosses=True, tokens=crossing)
