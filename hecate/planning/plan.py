"""`Plan`: the frozen answer of the planner, who holds which expert and who computes which tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Placement, Topology

__all__ = ["Plan", "check_counts"]

Int64 = NDArray[np.int64]
MAX_TOKENS = 2**40


@dataclass(frozen=True, eq=False)
class Plan:
    """One layer, one micro-batch. All arrays are int64 and read-only; validated on construction.

    Attributes:
        placement: who holds which expert, owners included.
        owners: `[num_experts]`, the device each expert belongs to; each holds its experts.
        topology: of the devices.
        holders: `[pairs, 2]` (expert, device) of `placement`, ascending.
        quota: `[source device, pair]`, tokens the device sends to that holder.
        device_loads: `[num_devices]`, tokens each device computes.
        copies: pairs beyond the owners.
        crossings: pairs of an expert and a node that holds it but not its owner.
        bytes: `copies` times the bytes of an expert.
        lower_bound: the smallest max/mean device load that is provable for the slots the plan was made for.
    """

    placement: Placement
    owners: Int64
    topology: Topology
    holders: Int64
    quota: Int64
    device_loads: Int64
    copies: int
    crossings: int
    bytes: int
    lower_bound: float

    @classmethod
    def build(
        cls,
        placement: Placement,
        owners: Int64,
        topology: Topology,
        quota: Int64,
        *,
        expert_bytes: int = 1,
        lower_bound: float = 1.0,
    ) -> Plan:
        """The plan that follows from `placement` and `quota`."""
        holders = np.argwhere(placement.matrix).astype(np.int64, copy=False)
        loads = np.zeros(topology.num_devices, dtype=np.int64)
        np.add.at(loads, holders[:, 1], quota.sum(axis=0))
        copies = len(holders) - placement.num_experts
        return cls(
            placement=placement,
            owners=owners,
            topology=topology,
            holders=holders,
            quota=quota,
            device_loads=loads,
            copies=copies,
            crossings=count_crossings(holders, owners, topology),
            bytes=copies * expert_bytes,
            lower_bound=lower_bound,
        )

    def __post_init__(self) -> None:
        for name in ("owners", "holders", "quota", "device_loads"):
            array = getattr(self, name)
            view = np.ascontiguousarray(array, dtype=np.int64).view()
            view.setflags(write=False)
            object.__setattr__(self, name, view)
        experts, devices, pairs = self.placement.num_experts, self.placement.num_devices, len(self.holders)
        _rule(devices == self.topology.num_devices, f"placement has {devices} devices, topology {self.topology}")
        _rule(self.owners.shape == (experts,), f"owners has shape {self.owners.shape}, placement {experts} experts")
        _rule(self.quota.shape == (devices, pairs), f"quota has shape {self.quota.shape}, must be {(devices, pairs)}")
        _rule(bool((self.quota >= 0).all()), "quota has a negative entry")
        _rule(pairs == int(self.placement.matrix.sum()), f"{pairs} holders, placement has another number of pairs")
        _rule(bool(self.placement.matrix[self.holders[:, 0], self.holders[:, 1]].all()), "a holder is not in placement")
        keys = self.holders[:, 0] * devices + self.holders[:, 1]
        _rule(bool((np.diff(keys) > 0).all()), "holders do not ascend")
        _rule(bool(self.placement.matrix[np.arange(experts), self.owners].all()), "an owner does not hold its expert")
        computed = np.bincount(self.holders[:, 1], weights=self.quota.sum(axis=0), minlength=devices)
        _rule(bool((computed == self.device_loads).all()), "device_loads are not the sums of quota")

    @property
    def imbalance(self) -> float:
        """Max/mean device load; 1.0 without tokens."""
        total = int(self.device_loads.sum())
        return int(self.device_loads.max()) * self.topology.num_devices / total if total else 1.0

    @property
    def counts(self) -> Int64:
        """Int64 `[source device, expert]`: the counts that `quota` places."""
        return np.add.reduceat(self.quota, np.searchsorted(self.holders[:, 0], np.arange(len(self.owners))), axis=1)

    def digest(self) -> str:
        """Hash of everything ranks must agree on, for HECATE_DEBUG."""
        hashed = hashlib.sha256()
        for array in (self.owners, self.holders, self.quota):
            hashed.update(repr(array.shape).encode() + array.tobytes())
        return hashed.hexdigest()


def count_crossings(holders: Int64, owners: Int64, topology: Topology) -> int:
    """Pairs of an expert and a foreign node that holds it."""
    node = holders[:, 1] // topology.devices_per_node
    foreign = node != owners[holders[:, 0]] // topology.devices_per_node
    return len(np.unique(holders[foreign, 0] * topology.num_nodes + node[foreign]))


def check_counts(counts: object, num_devices: int, num_experts: int) -> Int64:
    """`counts` as C-contiguous int64 `[num_devices, num_experts]`; ValueError names value and rule."""
    array = np.asarray(counts)
    if array.shape != (num_devices, num_experts) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"counts: shape {array.shape}, dtype {array.dtype}; must be integers of shape "
            f"[num_devices={num_devices}, num_experts={num_experts}]"
        )
    array = np.ascontiguousarray(array, dtype=np.int64)
    if array.size and array.min() < 0:
        device, expert = np.argwhere(array < 0)[0]
        raise ValueError(f"counts: {array[device, expert]} tokens of device {device} for expert {expert}, must be >= 0")
    if array.size and (array.max() > MAX_TOKENS or array.sum() > MAX_TOKENS):
        raise ValueError(f"counts: {array.sum(dtype=object)} tokens in total, must be <= 2**40")
    return array


def _rule(holds: bool, broken: str) -> None:
    if not holds:
        raise ValueError(f"Plan: {broken}")
