"""New owners for all layers at once: the paper's Algorithm 2, and ours: as balanced, with fewer moved experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hecate._native import few_moves as native_few_moves
from hecate._native import heterogeneous_sharding as native_heterogeneous_sharding
from hecate.placement import Topology

__all__ = ["few_moves", "heterogeneous_sharding"]

Int64 = NDArray[np.int64]


def heterogeneous_sharding(loads: Sequence[Int64], topology: Topology, overlap_degree: Sequence[int]) -> list[Int64]:
    """Algorithm 2 of the paper (section 4.2): owners, int64 `[num_experts]` per layer.

    Args:
        loads: int64 `[num_experts]` per layer; layers may have different numbers of experts.
        topology: which devices share a node.
        overlap_degree: the paper's t, per layer: its t hottest experts are placed last, in the slots that are left.

    Layers are placed in descending order of their largest load, and the experts of a layer in descending order of load.
    Each expert goes to the node with the least load of that layer, and in the node to the device with the least load
    (on a tie, the one with fewer free slots). A device owns at most `ceil(all experts / num_devices)` experts, and
    exactly that many if the number of experts is divisible by the number of devices.
    """
    _check_layers(loads, overlap_degree)
    layers = [load.tolist() for load in loads]
    shape = (topology.num_devices, topology.devices_per_node)
    owners = native_heterogeneous_sharding(layers, _degrees(loads, overlap_degree), *shape)
    return [np.array(owner) for owner in owners]


def few_moves(
    loads: Sequence[Int64], owners: Sequence[Int64], topology: Topology, overlap_degree: Sequence[int]
) -> list[Int64]:
    """Change `owners` by few swaps until they are as balanced as those of Algorithm 2.

    Arguments are those of `heterogeneous_sharding`. A swap exchanges two experts of one layer, so each device keeps its
    number of experts per layer. Swapping in a layer ends when its largest device load, not counting the t hottest
    experts, is no larger than Algorithm 2 would reach, or when no swap lowers it.
    """
    goals = heterogeneous_sharding(loads, topology, overlap_degree)
    layers, start, wanted = ([array.tolist() for array in arrays] for arrays in (loads, owners, goals))
    swapped = native_few_moves(layers, start, wanted, _degrees(loads, overlap_degree), topology.num_devices)
    return [np.array(owner) for owner in swapped]


def _degrees(loads: Sequence[Int64], overlap_degree: Sequence[int]) -> list[int]:
    """The paper's `t = min(t, |E|)`."""
    return [min(degree, len(load)) for load, degree in zip(loads, overlap_degree, strict=True)]


def _check_layers(loads: Sequence[Int64], overlap_degree: Sequence[int]) -> None:
    if len(loads) != len(overlap_degree):
        raise ValueError(f"re-sharding: loads of {len(loads)} layers, overlap_degree of {len(overlap_degree)}")
    for layer, load in enumerate(loads):
        if load.ndim != 1 or not load.size:
            raise ValueError(f"re-sharding: loads of layer {layer} have shape {load.shape}, must be [num_experts >= 1]")
