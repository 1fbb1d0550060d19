"""`plan`: plan one layer from token counts, without a process group."""

from __future__ import annotations

from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hecate._native import lower_bound as native_lower_bound
from hecate.loads.counts import check_counts
from hecate.placement import Placement, Topology, check_owners
from hecate.planning.calibrate import few_copies, parts_per_million, target_load
from hecate.planning.limits import CopyLimits, LinkBudget
from hecate.planning.materialize import robust_copies
from hecate.planning.plan import Plan
from hecate.planning.quota import exact_quota

__all__ = ["lower_bound", "plan"]

Int64 = NDArray[np.int64]


def plan(
    counts: NDArray[np.integer],
    owners: NDArray[np.integer],
    topology: Topology,
    *,
    memory_slots: int,
    max_imbalance: float,
    prefer: Literal["copies", "crossings"] = "copies",
    history: NDArray[np.integer] | None = None,
    foreign_slots: int | None = None,
    byte_budget: LinkBudget | None = None,
    expert_bytes: int = 1,
) -> Plan:
    """Plan one layer: which experts to copy to which devices, and which tokens each device computes.

    Args:
        counts: int `[num_devices, num_experts]`, tokens that each source device routes to each expert; at most 2**40
            in total.
        owners: int `[num_experts]`, the device that owns each expert.
        topology: which devices share a node.
        memory_slots: number of copies that a device may hold.
        max_imbalance: max/mean device load to reach, >= 1. If the slots do not allow it, the plan is the best that the
            search finds; compare its `imbalance` with its `lower_bound`.
        prefer: what to minimize, "copies" or "crossings" (pairs of an expert and a node that holds a copy of it but not
            its owner).
        history: int `[steps, num_devices, num_experts]`, earlier counts, oldest first. If given, copies are planned
            from it alone, to be robust against changing loads rather than few (`prefer` and `max_imbalance` are then
            not used); `counts` only determines the quota.
        foreign_slots: number of experts that may enter a node from outside; None means no limit.
        byte_budget: bytes that copies may put on each link; None means no limit.
        expert_bytes: size of one expert, used by `byte_budget` and the plan's `bytes`.

    Raises:
        ValueError: an invalid argument; the message names it, its value and the rule that it breaks.
    """
    owner_of = check_owners(owners, topology.num_devices)
    tokens = check_counts(counts, topology.num_devices, len(owner_of))
    _check_settings(memory_slots, max_imbalance, prefer, foreign_slots, expert_bytes)
    limits = CopyLimits.of(topology, min(memory_slots, len(owner_of)), foreign_slots, byte_budget, expert_bytes)
    loads = tokens.sum(axis=0)
    if history is not None:
        placement = robust_copies(_check_history(history, tokens.shape), owner_of, topology, limits)
    else:
        target = target_load(int(loads.sum()), topology.num_devices, parts_per_million(max_imbalance))
        start = Placement.from_owners(owner_of, topology.num_devices)
        placement = few_copies(loads, start, topology, limits, target=target, prefer=prefer)
    made = Plan.build(
        placement,
        owner_of,
        topology,
        exact_quota(tokens, placement, topology),
        expert_bytes=expert_bytes,
        lower_bound=lower_bound(loads, owner_of, topology, limits),
    )
    made.validate()
    return made


def lower_bound(loads: Int64, owners: Int64, topology: Topology, limits: CopyLimits) -> float:
    """A lower bound on the max/mean device load of every plan within `limits`.

    A device can compute at most the tokens of its own experts and of the hottest other experts, as many as may enter
    it; likewise for a node. The bound is the smallest load per device with which these shares still cover all tokens.
    """
    total = int(loads.sum())
    if not total:
        return 1.0
    least = native_lower_bound(loads, owners, limits.device_in)
    node_owners = owners // topology.devices_per_node
    per_node = native_lower_bound(loads, node_owners, limits.node_in)
    least = max(least, -(-per_node // topology.devices_per_node))
    return least * topology.num_devices / total


def _check_settings(
    memory_slots: int, max_imbalance: float, prefer: str, foreign_slots: int | None, expert_bytes: int
) -> None:
    if not _is_int(memory_slots) or memory_slots < 0:
        raise ValueError(f"memory_slots={memory_slots!r}: must be an integer >= 0")
    if isinstance(max_imbalance, bool) or not isinstance(max_imbalance, Real) or not 1 <= max_imbalance < 2**30:
        raise ValueError(f"max_imbalance={max_imbalance!r}: must be a number >= 1")
    if prefer not in ("copies", "crossings"):
        raise ValueError(f"prefer={prefer!r}: must be one of 'copies', 'crossings'")
    if foreign_slots is not None and (not _is_int(foreign_slots) or foreign_slots < 0):
        raise ValueError(f"foreign_slots={foreign_slots!r}: must be an integer >= 0, or None")
    if not _is_int(expert_bytes) or expert_bytes < 1:
        raise ValueError(f"expert_bytes={expert_bytes!r}: must be an integer >= 1")


def _check_history(history: NDArray[np.integer], shape: tuple[int, ...]) -> Int64:
    steps = np.asarray(history)
    if steps.ndim != 3 or steps.shape[1:] != shape:
        raise ValueError(
            f"history: shape {steps.shape}, must be [steps, num_devices={shape[0]}, num_experts={shape[1]}]"
        )
    return np.stack([check_counts(step, *shape) for step in steps]) if len(steps) else np.zeros((0, *shape), np.int64)


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
