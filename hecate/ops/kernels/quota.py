"""The exact min-max quota on the device of the counts, for a placement known on the host.

Shapes: D devices, E experts, P pairs (an expert and one of its holders, ascending). A group is an expert's holders in
one node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.ops.kernels.launch import THREADS, Launch, ThreadOrder, run, to_device
from hecate.placement import Placement, Topology

__all__ = ["QuotaProblem", "exact_quota"]

SHARED_BYTES = 96 * 1024
"""Larger problems work in global memory. Every device that the kernels compile for has more shared memory."""
_Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class QuotaProblem:
    """What the kernel must know of a placement; made once per placement.

    Attributes:
        sizes: D, E, P, groups, arcs, devices per node.
        tables: int64, on the device: the arrays of `QuotaArgs` in csrc/cuda/quota.cuh that depend on the placement.
    """

    sizes: tuple[int, int, int, int, int, int]
    tables: tuple[Tensor, ...]

    @classmethod
    def of(cls, placement: Placement, topology: Topology, device: torch.device) -> QuotaProblem:
        """The problem of `placement`, every expert of which must have a holder; does not synchronize with `device`.

        Raises:
            ValueError: an expert has no holder, or the topology has another number of devices.
        """
        if placement.num_devices != topology.num_devices:
            raise ValueError(
                f"placement has {placement.num_devices} devices, topology {topology.num_devices}: they must be the same"
            )
        if not placement.matrix.any(axis=1).all():
            expert = int(np.flatnonzero(~placement.matrix.any(axis=1))[0])
            raise ValueError(f"placement: expert {expert} has no holder, every expert must have its owner")
        arrays, groups, arcs = _tables(placement, topology)
        joined = to_device(np.concatenate(arrays), device)
        sizes = (placement.num_devices, placement.num_experts, len(arrays[1]), groups, arcs, topology.devices_per_node)
        return cls(sizes, joined.split([len(array) for array in arrays]))

    @property
    def work_words(self) -> int:
        """Numbers of 8 bytes that the kernel works on."""
        devices, experts, pairs, groups, arcs, _ = self.sizes
        return 3 * devices + 2 * pairs + 2 * experts + 2 * groups + arcs + 7 * (devices + groups + experts) + 4


def exact_quota(
    counts: Tensor, problem: QuotaProblem, order: ThreadOrder = "ascending", shared_bytes: int = SHARED_BYTES
) -> tuple[Tensor, Tensor]:
    """The quota of `hecate.planning.quota.exact_quota`, bit by bit; one launch of one block, no synchronization.

    Args:
        counts: int64 `[D, E]`, contiguous, not negative, totals up to 2**40: tokens of each device for each expert.
        problem: of the placement.
        order: of emulated threads.
        shared_bytes: most shared memory to work in; a larger problem works in global memory.

    Returns:
        int64 `[D, P]`, tokens that each device sends to each pair, and int64 `[1]`, the maximum device load.
    """
    devices, experts, pairs = problem.sizes[:3]
    if counts.dtype != torch.int64 or counts.shape != (devices, experts) or not counts.is_contiguous():
        raise ValueError(
            f"exact_quota: counts {counts.dtype} {tuple(counts.shape)}, must be contiguous torch.int64 "
            f"{(devices, experts)}"
        )
    quota, limit = counts.new_empty(devices, pairs), counts.new_empty(1)
    needed = 8 * problem.work_words
    work = None if needed <= shared_bytes else counts.new_empty(problem.work_words)
    args = (counts, quota, limit, *problem.sizes, *problem.tables, work)
    launch = Launch("quota", "quota", 1, (THREADS, 1), needed if work is None else 0, args)
    run(launch, counts.device, order)
    return quota, limit


def _tables(placement: Placement, topology: Topology) -> tuple[list[_Int64], int, int]:
    """The tables in the order of `QuotaArgs`, the number of groups and the number of arcs."""
    expert, device = np.nonzero(placement.matrix)
    experts, devices, pairs = placement.num_experts, placement.num_devices, len(expert)
    first = np.searchsorted(expert, np.arange(experts + 1))
    several = (np.diff(first) > 1)[expert]
    node = device // topology.devices_per_node
    opens = np.ones(pairs, dtype=np.bool_)
    opens[1:] = (np.diff(expert) != 0) | (np.diff(node) != 0)
    begin = np.flatnonzero(opens)
    group = np.cumsum(opens) - 1

    pair_arc, group_arc, tail, head, kind = _arcs(expert, device, begin, group, several, devices)
    vertices = devices + len(begin) + experts
    # The arcs that leave a vertex, the last one made first.
    leaving = np.lexsort((-np.arange(len(tail)), tail))
    vertex_first = np.searchsorted(tail[leaving], np.arange(vertices + 1))
    shared = np.flatnonzero(several)
    on_device = shared[np.argsort(device[shared], kind="stable")]
    device_first = np.searchsorted(device[on_device], np.arange(devices + 1))
    tables = (
        *(first, device, expert, np.append(begin, pairs), expert[begin], device_first, on_device),
        *(pair_arc, group_arc, head, kind, vertex_first, leaving),
    )
    return [np.asarray(table, dtype=np.int64) for table in tables], len(begin), len(tail)


def _arcs(
    expert: _Int64, device: _Int64, begin: _Int64, group: _Int64, several: NDArray[np.bool_], devices: int
) -> tuple[_Int64, _Int64, _Int64, _Int64, _Int64]:
    """(first arc per pair, first arc per group, tail, head and kind of each arc), in the order of the host's solver.

    Each pair of an expert with several holders has an arc for the device's own tokens, one for other tokens, and the
    reverse of both; after the pairs of a group, the group has arcs for its node's tokens and for other tokens.
    """
    pair_arc, group_arc = np.full(len(expert), -1), np.full(len(begin), -1)
    tail: list[int] = []
    head: list[int] = []
    kind: list[int] = []

    def add(start: int, end: int, worth: int) -> int:
        arc = len(tail)
        tail.extend((start, end) * 2)
        head.extend((end, start) * 2)
        kind.extend((worth, worth, 0, 0))
        return arc

    for p in np.flatnonzero(several).tolist():
        g = int(group[p])
        pair_arc[p] = add(devices + g, int(device[p]), 1)
        if p + 1 == len(expert) or group[p + 1] != g:
            group_arc[g] = add(devices + len(begin) + int(expert[p]), devices + g, 2)
    return pair_arc, group_arc, np.array(tail, int), np.array(head, int), np.array(kind, int)
