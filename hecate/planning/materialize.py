"""Copies planned before the true loads are known: the paper's Algorithm 1, and ours for loads that drift and jump."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecate._native import robust_copies as native_robust_copies
from hecate._native import sparse_materialization as native_sparse_materialization
from hecate.loads.predict import Predictor, guesses
from hecate.placement import Placement, Topology
from hecate.planning.limits import CopyLimits
from hecate.planning.plan import added, with_copies

__all__ = ["copies_for", "robust_copies", "sparse_materialization"]

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
    start: Placement | None = None,
    predictor: Predictor = "recent",
) -> Placement:
    """Copies that keep the imbalance small although loads drift and jump. Fills the slots rather than saving copies.

    Args:
        history: int64 `[steps, num_devices, num_experts]`, oldest first; without steps nothing is copied.
        owners: int64 `[num_experts]`, the device that owns each expert.
        topology: which devices share a node.
        limits: how many further copies may enter and leave each device and node.
        start: owners, and copies that stay; None means owners only.
        predictor: see `loads.predict`.

    Many guesses of the next loads are balanced together: each copy is placed where it takes most load from overloaded
    devices, over all guesses, until the slots are full. If node crossings are limited, nodes are planned first: which
    experts enter which node, then which devices of the node hold them.
    """
    if not len(history):
        return start or Placement.from_owners(owners, topology.num_devices)
    return copies_for(guesses(history, predictor), owners, topology, limits, start)


def copies_for(
    levels: Int64, owners: Int64, topology: Topology, limits: CopyLimits, start: Placement | None = None
) -> Placement:
    """`robust_copies` for guesses that are there already: `levels`, int64 `[levels, guesses, num_experts]`."""
    start = start or Placement.from_owners(owners, topology.num_devices)
    if not limits.device_in.any():
        return start
    allowed = np.ones_like(start.matrix)
    if limits.by_node:
        allowed = np.repeat(_node_entries(levels, owners, topology, limits, start), topology.devices_per_node, axis=1)
    return _with_robust(start, levels, owners, limits.device_in, limits.device_out, allowed)


def _node_entries(
    levels: Int64, owners: Int64, topology: Topology, limits: CopyLimits, start: Placement
) -> NDArray[np.bool_]:
    """Bool `[num_experts, num_nodes]`: whether the node holds the expert, or a copy of it may enter the node."""
    home = Placement(start.matrix.reshape(len(owners), topology.num_nodes, -1).any(axis=2))
    node_owners = owners // topology.devices_per_node
    everywhere = np.ones_like(home.matrix)
    return _with_robust(home, levels, node_owners, limits.node_in, limits.node_out, everywhere).matrix


def _with_robust(
    start: Placement, levels: Int64, owners: Int64, most_in: Int64, most_out: Int64, allowed: NDArray[np.bool_]
) -> Placement:
    """`start` with robust copies; limits and `allowed`, bool `[num_experts, num_devices]`, concern further ones."""
    given = added(start, Placement.from_owners(owners, start.num_devices))
    trials = _trials(start.num_devices, int(np.minimum(most_in, len(owners)).sum()), len(given))
    return with_copies(start, native_robust_copies(levels, owners, given, most_in, most_out, allowed, trials))


def _trials(num_devices: int, free: int, given: int) -> int:
    """Number of trials of the local search, for `free` slots beside `given` copies that stay.

    Fewer with many devices, because each trial then takes longer, and fewer if there are few copies to move.
    """
    most = min(500, 32_000 // num_devices) * free // max(1, free + given)
    return max(20, min(most, 32 * free))
