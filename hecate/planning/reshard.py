"""New owners for all layers at once: the paper's Algorithm 2 and the same balance with fewer moved experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Topology

__all__ = ["few_moves", "heterogeneous_sharding"]

Int64 = NDArray[np.int64]


def heterogeneous_sharding(loads: Sequence[Int64], topology: Topology, overlap_degree: Sequence[int]) -> list[Int64]:
    """Algorithm 2 of the paper (section 4.2): owners int64 `[num_experts]` of each layer.

    Args:
        loads: one int64 `[num_experts]` a layer; layers may have different numbers of experts.
        topology: of the devices.
        overlap_degree: for each layer the paper's t: its t hottest experts are placed last, where room is left.

    Layers in descending order of their largest load, the other experts of a layer in descending load, each to the
    node and there to the device with the least load of that layer (tie: fewer free slots). A device owns at most
    `ceil(all experts / num_devices)`; where devices divide all experts, each owns exactly that.
    """
    free = _slots(sum(len(load) for load in loads), topology.num_devices)
    owners = [np.full(len(load), -1, dtype=np.int64) for load in loads]
    order = [np.argsort(-load, kind="stable") for load in loads]
    for layer in sorted(range(len(loads)), key=lambda i: (-int(loads[i].max()), i)):
        device_load = np.zeros(topology.num_devices, dtype=np.int64)
        for expert in order[layer][overlap_degree[layer] :]:
            device = _least_loaded(device_load, free, topology)
            owners[layer][expert] = device
            device_load[device] += loads[layer][expert]
            free[device] -= 1
    for layer, ranking in enumerate(order):
        for expert in ranking[: overlap_degree[layer]]:
            device = int(free.argmax())
            owners[layer][expert] = device
            free[device] -= 1
    return owners


def few_moves(
    loads: Sequence[Int64], owners: Sequence[Int64], topology: Topology, overlap_degree: Sequence[int]
) -> list[Int64]:
    """Owners as balanced as Algorithm 2 makes them, reached from `owners` by swapping as few experts as possible.

    Arguments as for `heterogeneous_sharding`. Two experts of one layer change places, so every device keeps its
    number of experts of every layer. A layer is left alone once its largest device load, without the t hottest
    experts, is what Algorithm 2 would reach, or no swap lowers it.
    """
    goals = heterogeneous_sharding(loads, topology, overlap_degree)
    swapped = []
    for load, owner, goal, degree in zip(loads, owners, goals, overlap_degree, strict=True):
        cold = load.copy()
        cold[np.argsort(-load, kind="stable")[:degree]] = 0
        target = int(_device_loads(cold, goal, topology).max())
        swapped.append(_swap_until(cold, owner.copy(), topology, target))
    return swapped


def _swap_until(cold: Int64, owners: Int64, topology: Topology, target: int) -> Int64:
    """Swaps an expert of the most loaded device for a lighter one elsewhere while that lowers the larger load."""
    while True:
        device_load = _device_loads(cold, owners, topology)
        crowded = int(device_load.argmax())
        most = int(device_load[crowded])
        if most <= target:
            return owners
        mine, others = np.flatnonzero(owners == crowded), np.flatnonzero(owners != crowded)
        if not len(mine) or not len(others):
            return owners
        moved = cold[mine][:, None] - cold[others][None, :]
        larger = np.maximum(most - moved, device_load[owners[others]][None, :] + moved)
        i, j = np.unravel_index(int(larger.argmin()), larger.shape)
        if larger[i, j] >= most:
            return owners
        a, b = mine[i], others[j]
        owners[a], owners[b] = owners[b], owners[a]


def _device_loads(loads: Int64, owners: Int64, topology: Topology) -> Int64:
    device_loads = np.zeros(topology.num_devices, dtype=np.int64)
    np.add.at(device_loads, owners, loads)
    return device_loads


def _slots(experts: int, num_devices: int) -> Int64:
    return np.full(num_devices, -(-experts // num_devices), dtype=np.int64)


def _least_loaded(device_load: Int64, free: Int64, topology: Topology) -> int:
    """The least-loaded node with a free slot, then its least-loaded device with one; ties: fewer free slots."""
    nodes = (topology.num_nodes, topology.devices_per_node)
    node_free = free.reshape(nodes).sum(axis=1)
    node = np.lexsort((node_free, device_load.reshape(nodes).sum(axis=1), node_free == 0))[0]
    first = int(node) * topology.devices_per_node
    inside = slice(first, first + topology.devices_per_node)
    return first + int(np.lexsort((free[inside], device_load[inside], free[inside] == 0))[0])
