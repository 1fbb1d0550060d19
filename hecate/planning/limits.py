"""How many copies may enter and leave each device and node: memory slots and byte budgets, in whole experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Topology

__all__ = ["CopyLimits", "LinkBudget"]

UNLIMITED = 2**30


@dataclass(frozen=True)
class LinkBudget:
    """Bytes that copies may send into and out of each device and each node; None means no limit.

    Copies are relayed: any device that holds an expert may send it on, so an expert enters each other node only once.
    """

    device_in: int | None = None
    device_out: int | None = None
    node_in: int | None = None
    node_out: int | None = None

    def __post_init__(self) -> None:
        for name in ("device_in", "device_out", "node_in", "node_out"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"LinkBudget.{name}={value!r}: must be an integer >= 0, or None")


@dataclass(frozen=True)
class CopyLimits:
    """Number of expert copies that may enter and leave: int64 `[num_devices]` and int64 `[num_nodes]`.

    `by_node` is true if the number of copies that cross nodes is limited.
    """

    device_in: NDArray[np.int64]
    device_out: NDArray[np.int64]
    node_in: NDArray[np.int64]
    node_out: NDArray[np.int64]
    by_node: bool

    @classmethod
    def of(
        cls,
        topology: Topology,
        slots: int | NDArray[np.int64],
        foreign_slots: int | None = None,
        budget: LinkBudget | None = None,
        expert_bytes: int = 1,
    ) -> CopyLimits:
        """Limits that follow from memory slots and link bytes.

        Args:
            topology: which devices share a node.
            slots: copies per device, one number or int64 `[num_devices]`.
            foreign_slots: experts that may enter a node from outside; None means no limit.
            budget: bytes per link; None means no limit.
            expert_bytes: size of one expert, to convert `budget` to experts.
        """
        budget = budget or LinkBudget()
        d_in, d_out, n_in, n_out = (
            UNLIMITED if size is None else min(UNLIMITED, size // expert_bytes)
            for size in (budget.device_in, budget.device_out, budget.node_in, budget.node_out)
        )
        entering = n_in if foreign_slots is None else min(foreign_slots, n_in)
        return cls(
            np.minimum(slots, np.full(topology.num_devices, d_in, dtype=np.int64)),
            np.full(topology.num_devices, d_out, dtype=np.int64),
            np.full(topology.num_nodes, entering, dtype=np.int64),
            np.full(topology.num_nodes, n_out, dtype=np.int64),
            by_node=topology.num_nodes > 1 and min(entering, n_out) < UNLIMITED,
        )
