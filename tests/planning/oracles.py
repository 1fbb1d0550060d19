"""Slow, obvious versions of the planner's algorithms, and random cases to compare on."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from hecate.cost import CostModel, LayerCost
from hecate.placement import Placement, Topology, initial_owners
from hecate.policies import LayerSetting

Int64 = NDArray[np.int64]


def random_case(seed: int) -> tuple[Int64, Int64, Placement, Topology]:
    """Counts, owners, a placement with random copies and a topology; some experts and devices without tokens."""
    rng = np.random.default_rng(seed)
    devices = int(rng.choice([1, 2, 3, 4, 6, 8, 12]))
    experts = int(rng.integers(1, 17))
    per_node = int(rng.choice([n for n in range(1, devices + 1) if devices % n == 0]))
    counts = rng.integers(0, 50, (devices, experts)) * rng.integers(0, 20, experts)
    counts[rng.random(devices) < 0.1] = 0
    owners = rng.permutation(initial_owners(experts, devices))
    copies = rng.random((experts, devices)) < rng.choice([0.0, 0.15, 0.4, 1.0])
    placement = Placement(Placement.from_owners(owners, devices).matrix | copies)
    return counts.astype(np.int64), owners, placement, Topology(devices, per_node)


def setting(topology: Topology, model: CostModel | None = None, **changes: Any) -> LayerSetting:
    """A layer with 1 M parameters per expert and 2048 tokens per device."""
    cost = LayerCost(model or CostModel(), 2**21, 2**21, 6 * 2**20, 2048, 2**24)
    return replace(LayerSetting(topology, cost, 2, 1.02, "auto", "pays", 2048), **changes)


def pair_loads(quota: Int64, placement: Placement) -> Int64:
    """Tokens each device computes."""
    loads = np.zeros(placement.num_devices, dtype=np.int64)
    for pair, device in enumerate(np.nonzero(placement.matrix)[1]):
        loads[device] += quota[:, pair].sum()
    return loads


def placed_counts(quota: Int64, placement: Placement) -> Int64:
    """Counts `[devices, experts]` recovered from the quota."""
    counts = np.zeros((placement.num_devices, placement.num_experts), dtype=np.int64)
    for pair, expert in enumerate(np.nonzero(placement.matrix)[0]):
        counts[:, expert] += quota[:, pair]
    return counts


def locality(quota: Int64, placement: Placement, topology: Topology) -> tuple[int, int]:
    """Tokens that stay on their device, and tokens that stay in their node (the former included)."""
    own = node = 0
    for pair, device in enumerate(np.nonzero(placement.matrix)[1]):
        own += quota[device, pair]
        first = topology.node_of(device) * topology.devices_per_node
        node += quota[first : first + topology.devices_per_node, pair].sum()
    return int(own), int(node)


def lp_min_max(loads: Int64, placement: Placement) -> float:
    """The smallest maximum device load with fractional tokens, by HiGHS; variables: tokens per pair, and the load."""
    expert, device = np.nonzero(placement.matrix)
    pairs, index = len(expert), np.arange(len(expert))
    every = np.arange(placement.num_devices)
    upper = coo_matrix(
        (
            np.concatenate([np.ones(pairs), -np.ones(len(every))]),
            (np.concatenate([device, every]), np.concatenate([index, np.full(len(every), pairs)])),
        )
    )
    equal = coo_matrix((np.ones(pairs), (expert, index)), shape=(placement.num_experts, pairs + 1))
    cost = np.zeros(pairs + 1)
    cost[-1] = 1
    return float(linprog(cost, upper, np.zeros(len(every)), equal, loads, method="highs").fun)


def lp_locality(
    counts: Int64, placement: Placement, topology: Topology, limit: int, own_value: float, node_value: float
) -> float:
    """The largest total value of tokens that stay on their device or in their node, with no load above `limit`.

    The variables are the quota itself, `[source, pair]`, so that this does not repeat the planner's reasoning.
    """
    expert, device = np.nonzero(placement.matrix)
    sources, pairs = placement.num_devices, len(expert)
    variable = np.arange(sources * pairs).reshape(sources, pairs)
    source = np.arange(sources)[:, None]
    same = source // topology.devices_per_node == device[None] // topology.devices_per_node
    value = own_value * (source == device[None]) + node_value * same
    upper = coo_matrix(
        (np.ones(variable.size), (np.tile(device, sources), variable.ravel())), shape=(sources, variable.size)
    )
    row = source * placement.num_experts + expert[None]
    equal = coo_matrix((np.ones(variable.size), (row.ravel(), variable.ravel())), shape=(counts.size, variable.size))
    return -float(linprog(-value.ravel(), upper, np.full(sources, limit), equal, counts.ravel(), method="highs").fun)


def even_dispatch(counts: Int64, placement: Placement, topology: Topology) -> NDArray[np.float64]:
    """The paper's dispatch (section 4.4) with fractional tokens, `[source, pair]`."""
    expert, device = np.nonzero(placement.matrix)
    quota = np.zeros((placement.num_devices, len(expert)))
    for source in range(placement.num_devices):
        for e in range(placement.num_experts):
            pairs = np.flatnonzero(expert == e)
            node = [p for p in pairs if topology.node_of(device[p]) == topology.node_of(source)]
            own = [p for p in pairs if device[p] == source]
            for chosen in (own or node or list(pairs),):
                quota[source, chosen] += counts[source, e] / len(chosen)
    return quota


def fewest_copies(loads: Int64, owners: Int64, num_devices: int, slots: int, target: int) -> int | None:
    """The least number of copies with which no device exceeds `target`, by trying all sets; None if impossible."""
    start = Placement.from_owners(owners, num_devices).matrix
    free = np.argwhere(~start)
    for size in range(min(len(free), slots * num_devices) + 1):
        for chosen in combinations(range(len(free)), size):
            matrix = start.copy()
            matrix[tuple(free[list(chosen)].T)] = True
            if (matrix.sum(axis=0) - start.sum(axis=0)).max() > slots:
                continue
            if lp_min_max(loads, Placement(matrix)) <= target + 1e-6:
                return size
    return None


def least_load(loads: Int64, start: Placement, slots: int | Int64) -> int:
    """The smallest maximum load that any copies in addition to `start` allow, by trying all maximal sets of copies.

    `slots` is one number per device, or int64 `[num_devices]`. The maximum load of a set of copies is that of its
    fullest group of devices: the tokens of experts that only the group holds, divided by the devices of the group.
    """
    devices = start.num_devices
    holders = (start.matrix << np.arange(devices)).sum(axis=1)[None]  # bit masks, [sets, experts]
    for device, free in enumerate(np.broadcast_to(slots, devices)):
        others = np.flatnonzero(~start.matrix[:, device])
        chosen = list(combinations(others, min(int(free), len(others))))
        added = np.zeros((len(chosen), len(loads)), dtype=np.int64)
        for row, experts in zip(added, chosen, strict=True):
            row[list(experts)] = 1 << device
        holders = (holders[:, None] | added[None]).reshape(-1, len(loads))
    largest = np.zeros(len(holders), dtype=np.int64)
    for group in range(1, 1 << devices):
        stuck = ((holders & ~group) == 0) @ loads
        largest = np.maximum(largest, -(-stuck // group.bit_count()))
    return int(largest.min())


def algorithm_1(loads: Int64, owners: Int64, topology: Topology, degree: int, slots: int) -> NDArray[np.bool_]:
    """The paper's Algorithm 1, one copy at a time."""
    held = {(e, int(owners[e])) for e in range(len(loads))}
    degree = min(degree, len(loads))
    slots = min(slots, degree)
    hottest = sorted(range(len(loads)), key=lambda e: (-loads[e], e))[:degree]
    if degree <= slots:
        held |= {(e, d) for e in hottest for d in range(topology.num_devices)}
    else:
        free = [slots] * topology.num_devices
        total = sum(int(loads[e]) for e in hottest)
        for e in hottest:
            share = -(-topology.num_devices * slots * int(loads[e]) // total) if total else 0
            for _ in range(min(share, topology.num_devices - 1)):
                rank = {}
                for d in range(topology.num_devices):
                    if free[d] and (e, d) not in held:
                        members = [x for x in range(topology.num_devices) if topology.node_of(x) == topology.node_of(d)]
                        copies = sum((e, x) in held for x in members)
                        room = sum(free[x] for x in members if (e, x) not in held)
                        rank[d] = (copies, -room, -free[d], d)
                if rank:
                    best = min(rank, key=lambda d: rank[d])
                    held.add((e, best))
                    free[best] -= 1
    matrix = np.zeros((len(loads), topology.num_devices), dtype=np.bool_)
    for e, d in held:
        matrix[e, d] = True
    return matrix


def algorithm_2(loads: list[Int64], topology: Topology, degrees: list[int]) -> list[list[int]]:
    """The paper's Algorithm 2, one expert at a time."""
    free = [-(-sum(map(len, loads)) // topology.num_devices)] * topology.num_devices
    owners = [[-1] * len(load) for load in loads]
    nodes = [[d for d in range(topology.num_devices) if topology.node_of(d) == n] for n in range(topology.num_nodes)]
    hot = [sorted(range(len(load)), key=lambda e: (-load[e], e))[:t] for load, t in zip(loads, degrees, strict=True)]
    for i in sorted(range(len(loads)), key=lambda i: (-max(loads[i]), i)):
        busy = [0] * topology.num_devices
        for e in sorted(range(len(loads[i])), key=lambda e: (-loads[i][e], e)):
            if e in hot[i]:
                continue
            open_nodes = [n for n in nodes if sum(free[d] for d in n)]
            node = min(open_nodes, key=lambda n: (sum(busy[d] for d in n), sum(free[d] for d in n)))
            device = min((d for d in node if free[d]), key=lambda d: (busy[d], free[d]))
            owners[i][e] = device
            busy[device] += int(loads[i][e])
            free[device] -= 1
    for i, experts in enumerate(hot):
        for e in experts:
            device = max(range(topology.num_devices), key=lambda d: (free[d], -d))
            owners[i][e] = device
            free[device] -= 1
    return owners
