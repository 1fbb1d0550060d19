"""One round of `benchmarks.planning_time`, in a process of its own: prints setting -> part -> milliseconds as JSON.

Uses only what other commits have too, so that it can measure them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hecate.collectives.route import Links, gather_route, reduce_route
from hecate.cost import CostModel, LayerCost
from hecate.loads.synthetic import synthetic_loads
from hecate.placement import Placement, Topology, initial_owners
from hecate.planning.limits import CopyLimits
from hecate.planning.materialize import robust_copies, sparse_materialization
from hecate.policies import get_policy
from hecate.policies.base import LayerSetting

NODE, SLOTS, FOREIGN = 8, 2, 16
EXPERT_BYTES = 2 * 4 * 768**2
LAYERS, THREADS = 60, 4


def measure(devices: int, experts: int, repeats: int) -> dict[str, float]:
    """Part -> milliseconds: the least of `repeats` calls."""
    topology, owners = Topology(devices, NODE), initial_owners(experts, devices)
    history = synthetic_loads("drift", devices, experts, 1024, 8, 0, steps=5, drift_rate=0.1, step_noise=0.15)
    loads = history.sum(axis=(0, 1))
    holders = sparse_materialization(loads, owners, topology, overlap_degree=experts // 4, memory_slots=SLOTS)
    start, links = Placement.from_owners(owners, devices), Links.of(CostModel(), topology, "cuda")
    anywhere, near = CopyLimits.of(topology, SLOTS), CopyLimits.of(topology, SLOTS, FOREIGN)

    # FOREIGN copies may enter a node while other work hides them.
    cost = LayerCost(CostModel(), EXPERT_BYTES, EXPERT_BYTES, 6 * EXPERT_BYTES // 2, 8192, 2 * 10**7)
    setting = LayerSetting(topology, cost, SLOTS, 1.02, FOREIGN // NODE, "pays", 1024)

    def layers() -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda _: robust_copies(history, owners, topology, near), range(LAYERS)))

    gather, reduce = gather_route.__wrapped__, reduce_route.__wrapped__  # not from the cache
    parts: dict[str, tuple[Callable[[], object], Callable[[], float]]] = {
        "plan ahead": (lambda: robust_copies(history, owners, topology, anywhere), time.thread_time),
        "plan ahead, node limits": (lambda: robust_copies(history, owners, topology, near), time.thread_time),
        "plan ahead, policy": (lambda: get_policy("balanced").materialize(setting, history, owners), time.thread_time),
        "gather route": (lambda: gather(start, holders, topology, links, EXPERT_BYTES), time.thread_time),
        "reduce route": (
            lambda: reduce(holders, start, topology, links, EXPERT_BYTES, 2 * EXPERT_BYTES),
            time.thread_time,
        ),
    }
    if (devices, experts) == (64, 256):
        parts[f"{LAYERS} layers in {THREADS} threads, wall"] = (layers, time.perf_counter)
    return {name: least(call, clock, repeats if name[0] != "6" else 1) for name, (call, clock) in parts.items()}


def least(call: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    """Milliseconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return float(np.min(times)) * 1e3


if __name__ == "__main__":
    repeats, *settings = sys.argv[1:]
    found = {}
    for setting in settings:
        devices, experts = map(int, setting.split("x"))
        found[setting] = measure(devices, experts, int(repeats))
    print(json.dumps(found))
