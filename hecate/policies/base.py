"""What a policy decides: which experts are copied where, which device computes which tokens, and who owns experts.

(Section 4 of the paper.) A policy has no state and does not communicate: it maps integers to frozen plans, so every
rank makes the same plan from the same counts. The engine calls it in this order:

1. `materialize`, per layer, before a step: copies planned from the load history.
2. `calibrate`, per layer and micro-batch, after the gate: further copies for the true counts.
3. `assign`, right after that: which device computes which tokens.
4. `reshard`, every `reshard_interval` steps, for all layers at once: new owners.
5. `keep`, per layer, right after that and only if the policy `keeps` copies: those that stay until the next time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hecate.cost import LayerCost
from hecate.placement import Placement, Topology
from hecate.planning.calibrate import few_copies, parts_per_million, target_load
from hecate.planning.limits import CopyLimits
from hecate.planning.plan import Calibration, Plan, copies_on
from hecate.planning.quota import balanced

__all__ = ["LayerSetting", "Policy", "Weighing", "fewest_copies", "finished", "node_entries", "overlap_degree"]


@dataclass(frozen=True)
class LayerSetting:
    """What a policy knows about a layer besides its loads.

    Attributes:
        topology: which of the devices that share the layer's experts are in one node.
        cost: bytes and nanoseconds of its experts and tokens.
        memory_slots: number of copies that each device has room for.
        max_imbalance: max/mean device load to reach, >= 1.
        overlap_degree: the paper's t, or "auto" to take it from `cost`.
        calibrate: copy after the gate if it "pays", "always", or never (False).
        tokens_per_device: tokens of a device in a micro-batch ((token, expert) pairs divided by top_k), for the cost
            model.
    """

    topology: Topology
    cost: LayerCost
    memory_slots: int
    max_imbalance: float
    overlap_degree: int | Literal["auto"]
    calibrate: Literal["pays", "always", False]
    tokens_per_device: int


class Policy(Protocol):
    """What the engine calls. Counts are int64 `[num_devices, num_experts]`, owners int64 `[num_experts]`.

    Attributes:
        copies: whether the policy ever copies experts; if not, no memory is kept for copies.
        keeps: whether its copies stay for many steps, with optimizer state of their own. They are trained like their
            owners' rows. Such a policy makes no other copies, and owners do not change.
    """

    copies: ClassVar[bool]
    keeps: ClassVar[bool]

    def materialize(self, layer: LayerSetting, history: NDArray[np.int64], owners: NDArray[np.int64]) -> Placement:
        """The placement to gather before the layer runs.

        `history` is int64 `[steps, num_devices, num_experts]`, oldest first; before the first step it is empty, and
        nothing is copied. The placement contains every (expert, owner) pair and at most `memory_slots` further pairs
        per device.
        """

    def calibrate(
        self, layer: LayerSetting, counts: NDArray[np.int64], owners: NDArray[np.int64], placement: Placement
    ) -> Placement:
        """`placement`, or it with further copies within `memory_slots`, chosen for the true counts."""

    def assign(
        self, layer: LayerSetting, counts: NDArray[np.int64], owners: NDArray[np.int64], placement: Placement
    ) -> Plan:
        """The plan to execute: every token is assigned to exactly one holder of its expert."""

    def reshard(
        self,
        layers: Sequence[LayerSetting],
        loads: Sequence[NDArray[np.int64]],
        owners: Sequence[NDArray[np.int64]],
    ) -> list[NDArray[np.int64]]:
        """New owners for all layers at once, int64 `[num_experts]` per layer.

        `loads` has the same shapes: tokens per expert, summed over devices and steps. No device owns more than
        `ceil(all experts / num_devices)` experts, and each owns exactly that many if the number of experts is divisible
        by the number of devices. A policy may return `owners` unchanged.
        """

    def keep(
        self, layer: LayerSetting, loads: NDArray[np.int64], owners: NDArray[np.int64], kept: Placement
    ) -> Placement:
        """The copies that stay from now on, with their owners.

        `loads` is int64 `[num_experts]`, summed over devices and steps since the last time; `kept` are the present
        ones. At most `memory_slots` pairs per device are no owners'. Only called if the policy `keeps` copies.
        """


@runtime_checkable
class Weighing(Protocol):
    """A policy that copies after the gate only if it pays, and can say what it weighed."""

    def weigh(
        self, layer: LayerSetting, counts: NDArray[np.int64], owners: NDArray[np.int64], placement: Placement
    ) -> Calibration:
        """`calibrate`, with what the further copies save and cost. The engine calls it instead."""


def overlap_degree(layer: LayerSetting, crosses_node: bool | None = None) -> int:
    """The paper's t: as configured, or how many experts the cost model hides on the slower (or the given) link."""
    if layer.overlap_degree != "auto":
        return layer.overlap_degree
    crosses = layer.topology.num_nodes > 1 if crosses_node is None else crosses_node
    return layer.cost.overlap_degree(layer.tokens_per_device, crosses)


def node_entries(layer: LayerSetting) -> int:
    """Experts that may enter a node while other work hides them: all links of its devices together."""
    devices = layer.topology.devices_per_node
    if layer.overlap_degree != "auto":
        return layer.overlap_degree * devices
    return layer.cost.overlap_degree(layer.tokens_per_device, crosses_node=layer.topology.num_nodes > 1, links=devices)


def fewest_copies(
    layer: LayerSetting,
    counts: NDArray[np.int64],
    owners: NDArray[np.int64],
    placement: Placement,
    *,
    prefer: Literal["copies", "crossings"],
) -> Placement:
    """`placement` with the fewest further copies that bring the true loads within `max_imbalance`.

    It is returned unchanged if they are within it already, or if `layer.calibrate` is False.
    """
    dial, devices = parts_per_million(layer.max_imbalance), layer.topology.num_devices
    if not layer.calibrate or balanced(counts, placement, dial):
        return placement
    loads = counts.sum(axis=0)
    target = target_load(int(loads.sum()), devices, dial)
    limits = CopyLimits.of(layer.topology, layer.memory_slots - copies_on(placement, owners))
    return few_copies(loads, placement, layer.topology, limits, target=target, prefer=prefer)


def finished(
    layer: LayerSetting,
    owners: NDArray[np.int64],
    placement: Placement,
    quota: NDArray[np.int64],
    holders: NDArray[np.int64] | None = None,
) -> Plan:
    """A plan with this `quota`, int64 `[source device, pair]`, over the pairs `holders` of `placement`."""
    return Plan.build(placement, owners, layer.topology, quota, expert_bytes=layer.cost.expert_bytes, holders=holders)
