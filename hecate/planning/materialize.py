"""Copies planned before the true loads are known: the paper's Algorithm 1, and ours for loads that drift and jump."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecate._native import robust_copies as native_robust_copies
from hecate._native import sparse_materialization as native_sparse_materialization
from hecate.loads.predict import Predictor, guesses
from hecate.placement import Placement, Topology
from hecate.planning.limits import CopyLimits
from hecate.planning.plan import with_copies

__all__ = ["robust_copies", "sparse_materialization"]

Int64 = NDArray[np.int64]


def sparse_materialization(
    loads: Int64, owners: Int64, topology: Topology, *, overlap_degree: int, memory_slots: int
) -> Placement:
    """Algorithm 1 of the paper (section 4.2): copies of the `overlap_degree` (t) hottest experts.

    Args:
        loads: int64 `[num_experts]`, predicted tokens per expert.
        owners: int64 `[num_experts]`, the device that owns each expert.
        topology: which devices share a node.
        overlap_degree: the paper's t, the number of experts whose copies are hidden behind other work.
        memory_slots: the paper's m, the number of copies that a device has room for.

    If t <= m, the t hottest experts are copied to all devices. Otherwise they share `num_devices * m` slots in
    proportion to their loads, hottest first; each expert's copies go to the nodes and devices with the most free slots.
    """
    shape = (topology.num_devices, topology.devices_per_node)
    degree, slots = min(overlap_degree, len(loads)), min(memory_slots, len(loads))
    copies = native_sparse_materialization(loads.tolist(), owners.tolist(), *shape, degree, slots)
    return with_copies(Placement.from_owners(owners, topology.num_devices), copies)


def robust_copies(
    history: Int64,
    owners: Int64,
    topology: Topology,
    limits: CopyLimits,
    *,
    predictor: Predictor = "recent",
) -> Placement:
    """Copies that keep the imbalance small although loads drift and jump. Fills the slots rather than saving copies.

    Args:
        history: int64 `[steps, num_devices, num_experts]`, oldest first; without steps nothing is copied.
        owners: int64 `[num_experts]`, the device that owns each expert.
        topology: which devices share a node.
        limits: how many copies may enter and leave each device and node.
        predictor: see `loads.predict`.

    Many guesses of the next loads are balanced together: each copy is placed where it takes most load from overloaded
    devices, over all guesses, until the slots are full. If node crossings are limited, nodes are planned first: which
    experts enter which node, then which devices of the node hold them.
    """
    start = Placement.from_owners(owners, topology.num_devices)
    if not len(history):
        return start
    levels = guesses(history, predictor)
    allowed = np.ones_like(start.matrix)
    if limits.by_node:
        allowed = np.repeat(_node_entries(levels, owners, topology, limits), topology.devices_per_node, axis=1)
    trials = _trials(topology.num_devices)
    copies = native_robust_copies(levels, owners, limits.device_in, limits.device_out, allowed, trials)
    return with_copies(start, copies)


def _node_entries(levels: Int64, owners: Int64, topology: Topology, limits: CopyLimits) -> NDArray[np.bool_]:
    """Bool `[num_experts, num_nodes]`: whether the node owns the expert or a copy of it may enter the node."""
    node_owners = owners // topology.devices_per_node
    home = Placement.from_owners(node_owners, topology.num_nodes)
    trials = _trials(topology.num_nodes)
    entries = native_robust_copies(
        levels, node_owners, limits.node_in, limits.node_out, np.ones_like(home.matrix), trials
    )
    return with_copies(home, entries).matrix


def _trials(num_devices: int) -> int:
    """Number of trials of the local search: fewer with many devices, because each trial then takes longer."""
    return max(20, min(500, 32_000 // num_devices))
