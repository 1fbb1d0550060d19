"""`Plan`, the result of planning: which devices hold each expert, and how many of its tokens each of them computes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hecate._native import holders as native_holders
from hecate._native import plan_fault, plan_sums, rows_within_nodes
from hecate.placement import Placement, Topology

__all__ = ["Calibration", "Plan", "added", "copies_on", "with_copies"]

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a policy decided after the gate, and why.

    Attributes:
        before: the placement that was gathered before.
        placement: `before`, or it with further copies.
        saved_ns, price_ns: nanoseconds that further copies save and cost by the cost model, whether they were made or
            not; None if none were weighed.
    """

    before: Placement
    placement: Placement
    saved_ns: int | None = None
    price_ns: int | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of one layer for one micro-batch. Arrays are int64 and read-only; other values are derived when needed.

    Attributes:
        placement: which devices hold each expert, owners included.
        owners: `[num_experts]`, the device that owns each expert; it always holds the expert.
        topology: which devices share a node.
        holders: `[pairs, 2]`, the (expert, device) pairs of `placement` in ascending order.
        quota: `[source device, pair]`, number of tokens that the source device sends to that holder.
        expert_bytes: size of one expert, used by `bytes`.
        lower_bound: no plan within the given slots has a smaller max/mean device load than this; 1.0 if it was not
            computed.
        calibration: what was decided after the gate; None if nothing was. It explains the plan and changes nothing.
    """

    placement: Placement
    owners: Int64
    topology: Topology
    holders: Int64
    quota: Int64
    expert_bytes: int = 1
    lower_bound: float = 1.0
    calibration: Calibration | None = None

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
        holders: Int64 | None = None,
    ) -> Plan:
        """Make a plan from `placement` and `quota`. It is not validated; see `validate`.

        `holders` may be given if they are known already.
        """
        holders = native_holders(placement.matrix) if holders is None else holders
        return cls(placement, owners, topology, holders, quota, expert_bytes, lower_bound)

    def __post_init__(self) -> None:
        for name in ("owners", "holders", "quota"):
            object.__setattr__(self, name, _read_only(getattr(self, name)))

    def validate(self) -> None:
        """Raise ValueError naming the first inconsistent entry. Too slow to be called in every step."""
        experts, devices, pairs = self.placement.num_experts, self.placement.num_devices, len(self.holders)
        if devices != self.topology.num_devices:
            raise ValueError(f"Plan: placement has {devices} devices, topology {self.topology.num_devices}")
        shapes = {"owners": (experts,), "holders": (pairs, 2), "quota": (devices, pairs)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"Plan: {name} has shape {getattr(self, name).shape}, must be {shape}")
        fault = plan_fault(self.placement.matrix, self.owners, self.holders, self.quota, self.device_loads)
        if fault:
            raise ValueError(f"Plan: {fault}")

    @cached_property
    def device_loads(self) -> Int64:
        """`[num_devices]`, number of tokens that each device computes."""
        return _read_only(self._sums[0])

    @property
    def copies(self) -> int:
        """Number of (expert, device) pairs in which the device is not the owner."""
        return len(self.holders) - self.placement.num_experts

    @property
    def copied(self) -> Int64:
        """`[copies, 2]`, the (expert, device) pairs in which the device is not the owner, in ascending order."""
        return self.holders[self.owners[self.holders[:, 0]] != self.holders[:, 1]]

    @property
    def crossings(self) -> int:
        """Number of (expert, node) pairs in which the node holds a copy but not the owner."""
        return self._sums[1]

    @property
    def bytes(self) -> int:
        """`copies` times `expert_bytes`."""
        return self.copies * self.expert_bytes

    @cached_property
    def _sums(self) -> tuple[Int64, int]:
        return plan_sums(self.placement.matrix, self.owners, self.holders, self.quota, self.topology.devices_per_node)

    @cached_property
    def rows(self) -> tuple[int, int]:
        """Rows that all devices send, those to themselves included, and how many of them stay in their node."""
        return rows_within_nodes(self.holders, self.quota, self.topology.devices_per_node)

    @property
    def imbalance(self) -> float:
        """Maximum over mean device load; 1.0 if there are no tokens."""
        total = int(self.device_loads.sum())
        return int(self.device_loads.max()) * self.topology.num_devices / total if total else 1.0

    @property
    def counts(self) -> Int64:
        """Int64 `[source device, expert]`: the counts that the plan was made for, recovered from `quota`."""
        return np.add.reduceat(self.quota, np.searchsorted(self.holders[:, 0], np.arange(len(self.owners))), axis=1)

    def digest(self) -> str:
        """Hash of everything that must be equal on all ranks; compared if HECATE_DEBUG is set."""
        hashed = hashlib.sha256()
        for array in (self.owners, self.holders, self.quota):
            hashed.update(repr(array.shape).encode() + array.tobytes())
        return hashed.hexdigest()


def _read_only(array: Int64) -> Int64:
    view = np.ascontiguousarray(array, dtype=np.int64).view()
    view.setflags(write=False)
    return view


def with_copies(placement: Placement, copies: Int64 | Sequence[tuple[int, int]]) -> Placement:
    """`placement` with the pairs `copies`, int `[copies, 2]` (expert, device), added; itself if there are none."""
    pairs = np.asarray(copies, dtype=np.int64).reshape(-1, 2)
    if not len(pairs):
        return placement
    matrix = placement.matrix.copy()
    matrix[pairs[:, 0], pairs[:, 1]] = True
    return Placement(matrix)


def added(placement: Placement, start: Placement) -> Int64:
    """Int64 `[copies, 2]` (expert, device): the pairs of `placement` that are not in `start`."""
    return np.argwhere((placement - start).matrix).astype(np.int64, copy=False)


def copies_on(placement: Placement, owners: Int64) -> Int64:
    """Int64 `[num_devices]`: the copies that each device holds."""
    return placement.matrix.sum(axis=0) - np.bincount(owners, minlength=placement.num_devices)
