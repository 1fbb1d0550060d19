"""What a policy decides: when to plan, from what, and what may move (paper, section 4).

A policy holds no state and talks to nobody: it maps integers to frozen plans, so that every rank gets the same plan
from the same counts. The engine (and the simulator) call it in this order:

1. `materialize`, per layer, before a step: copies planned ahead from the load history.
2. `calibrate`, per layer and micro-batch, after the gate: further copies for the true counts.
3. `assign`, right after that: who computes which tokens.
4. `reshard`, every `reshard_interval` steps, for all layers at once: new owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hecate.cost import LayerCost
from hecate.placement import Placement, Topology
from hecate.planning.plan import Plan

__all__ = ["LayerSetting", "Policy", "finished", "overlap_degree"]


@dataclass(frozen=True)
class LayerSetting:
    """What a policy may know of a layer besides its loads.

    Attributes:
        topology: of the devices that share the layer's experts.
        cost: bytes and nanoseconds of its experts and tokens.
        memory_slots: copies each device has room for.
        max_imbalance: the dial, max/mean device load, >= 1.
        overlap_degree: the paper's t, or "auto" to take it from `cost`.
        calibrate: copy after the gate if it "pays", "always", or never (False).
        tokens_per_device: (token, expert) pairs of a device in a micro-batch divided by top_k, for the cost model.
    """

    topology: Topology
    cost: LayerCost
    memory_slots: int
    max_imbalance: float
    overlap_degree: int | Literal["auto"]
    calibrate: Literal["pays", "always", False]
    tokens_per_device: int


class Policy(Protocol):
    """Counts are int64 `[num_devices, num_experts]`; owners int64 `[num_experts]`; devices and experts ascend."""

    def materialize(self, layer: LayerSetting, history: NDArray[np.int64], owners: NDArray[np.int64]) -> Placement:
        """Placement to gather before the layer runs. `history` is `[steps, num_devices, num_experts]`, oldest first.

        Contains every (expert, owner) pair; at most `memory_slots` further pairs a device. Without history (no step
        yet) nothing is copied.
        """

    def calibrate(
        self, layer: LayerSetting, counts: NDArray[np.int64], owners: NDArray[np.int64], placement: Placement
    ) -> Placement:
        """`placement` or a superset of it within `memory_slots`, for the true counts."""

    def assign(
        self, layer: LayerSetting, counts: NDArray[np.int64], owners: NDArray[np.int64], placement: Placement
    ) -> Plan:
        """The plan to execute: every token on exactly one holder of its expert."""

    def reshard(
        self,
        layers: Sequence[LayerSetting],
        loads: Sequence[NDArray[np.int64]],
        owners: Sequence[NDArray[np.int64]],
    ) -> list[NDArray[np.int64]]:
        """New owners of each layer, int64 `[num_experts]`, from `loads` summed over devices and steps, likewise.

        All layers at once. No device owns more than `ceil(all experts / num_devices)`, and where devices divide all
        experts each owns exactly that. Equal to `owners` where moving does not pay.
        """


def overlap_degree(layer: LayerSetting, crosses_node: bool | None = None) -> int:
    """The paper's t: as configured, or what the cost model hides on the slower link (or the one asked for)."""
    if layer.overlap_degree != "auto":
        return layer.overlap_degree
    crosses = layer.topology.num_nodes > 1 if crosses_node is None else crosses_node
    return layer.cost.overlap_degree(layer.tokens_per_device, crosses)


def finished(layer: LayerSetting, owners: NDArray[np.int64], placement: Placement, quota: NDArray[np.int64]) -> Plan:
    """The plan of `quota` int64 `[source device, pair]`."""
    return Plan.build(placement, owners, layer.topology, quota, expert_bytes=layer.cost.expert_bytes)
