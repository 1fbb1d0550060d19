"""New owners for all layers at once: the paper's Algorithm 2 and the same balance with fewer moved experts."""

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
    """Algorithm 2 of the paper (section 4.2): owners int64 `[num_experts]` of each layer.

    Args:
        loads: one int64 `[num_experts]` a layer; layers may have different numbers of experts.
        topology: of the devices.
        overlap_degree: for each layer the paper's t: its t hottest experts are placed last, where room is left.

    Layers in descending order of their largest load, the other experts of a layer in descending load, each to the
    node and there to the device with the least load of that layer (tie: fewer free slots). A device owns at most
    `ceil(all experts / num_devices)`; where devices divide all experts, each owns exactly that.
    """
    _check_layers(loads, overlap_degree)
    layers = [load.tolist() for load in loads]
    shape = (topology.num_devices, topology.devices_per_node)
    owners = native_heterogeneous_sharding(layers, _degrees(loads, overlap_degree), *shape)
    return [np.array(owner) for owner in owners]


def few_moves(
    loads: Sequence[Int64], owners: Sequence[Int64], topology: Topology, overlap_degree: Sequence[int]
) -> list[Int64]:
    """Owners as balanced as Algorithm 2 makes them, reached from `owners` by swapping as few experts as possible.

    Arguments as for `heterogeneous_sharding`. Two experts of one layer change places, so every device keeps its
    number of experts of every layer. A layer is left alone once its largest device load, without the t hottest
    experts, is what Algorithm 2 would reach, or no swap lowers it.
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
