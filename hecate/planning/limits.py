"""How many copies may enter and leave each device and each node: slots and bytes, as whole experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecate.placement import Topology

__all__ = ["CopyLimits", "LinkBudget"]

UNLIMITED = 2**30


@dataclass(frozen=True)
class LinkBudget:
    """Bytes that copies may put on each link, in and out of a device and of a node; None: any number.

    Copies relay: a device that holds an expert may send it on, and an expert enters a foreign node once.
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
    """The same in whole experts: int64 `[num_devices]` twice, then int64 `[num_nodes]` twice.

    `by_node` says that something limits what crosses nodes.
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
        """`slots` copies a device (or int64 `[num_devices]`), `foreign_slots` experts entering a node, `budget`."""
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
