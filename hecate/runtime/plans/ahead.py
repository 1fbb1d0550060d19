"""Plans the next step's copies and their routes in threads while the backward pass runs. They issue no communication.

A step always waits for its plans, and a plan depends only on integers. So the timing of threads does not change plans.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

from hecate.placement import Placement
from hecate.runtime.experts.layer import LayerExperts
from hecate.runtime.plans.layer import LayerPlans, Outlook

__all__ = ["PlanAhead", "PlanningThreads", "number_of_threads"]

MOST_THREADS = 4
NICE = 10
"""Added to the niceness of planning threads, so that they use cores only while threads that compute leave them idle."""


def number_of_threads(setting: int | Literal["auto"], processes: int) -> int:
    """`FSSDPConfig.planning_threads`, where "auto" is this process's share of the CPU cores, at most 4.

    Args:
        setting: the value in the config.
        processes: processes on this machine that plan at the same time; they share its CPU cores.
    """
    return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // processes)) if setting == "auto" else setting


class PlanningThreads(ThreadPoolExecutor):
    """Threads with, on Linux, a lower priority than the rest of the process.

    Between their tasks they refer to no layer, so that they may outlive an engine until they are closed.

    Args:
        number: of threads.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "hecate-plan", _lower_priority)

    def close(self) -> None:
        """End the threads; plans that were started are dropped."""
        self.shutdown(wait=False, cancel_futures=True)


class PlanAhead:
    """Plans all layers of a model.

    Args:
        layers: plans of each MoE layer.
        threads: what plans.

    Attributes:
        seconds: time that the threads took for the plans of the present step, summed over layers.
    """

    def __init__(self, layers: Sequence[LayerPlans], threads: PlanningThreads) -> None:
        self._layers = tuple(layers)
        self._threads = threads
        self._started: list[tuple[Outlook, Future[_Timed]]] = []
        self.seconds = 0.0

    def start(self) -> None:
        """Start to plan from the loads known so far; replaces what was started before."""
        for _, future in self._started:
            future.cancel()
        outlooks = [layer.outlook() for layer in self._layers]
        self._started = [(outlook, self._threads.submit(_timed, outlook)) for outlook in outlooks]

    def placements(self) -> list[Placement]:
        """One placement per layer for the step that begins now; the routes of its copies have been made too.

        Plans that were started before are used if their inputs have not changed since.
        """
        if not self._started:
            self.start()
        begun, self._started = self._started, []
        futures = []
        for layer, (before, future) in zip(self._layers, begun, strict=True):
            outlook = layer.outlook()
            if not before.equals(outlook):
                future.cancel()
                future = self._threads.submit(_timed, outlook)
            futures.append(future)
            layer.planned_from(outlook.steps)
        results = [future.result() for future in futures]
        self.seconds = sum(result.seconds for result in results)
        return [result.placement for result in results]

    def make_routes(self, experts: LayerExperts, placement: Placement) -> None:
        """Start to make the routes that a placement with copies planned after the gate needs in its backward pass."""
        self._threads.submit(experts.make_routes, experts.owners, placement, gather=experts.shared is not None)


class _Timed(NamedTuple):
    placement: Placement
    seconds: float


def _timed(outlook: Outlook) -> _Timed:
    start = time.perf_counter()
    return _Timed(outlook.placement(), time.perf_counter() - start)


def _lower_priority() -> None:
    """Lower the priority of the calling thread; only Linux has priorities per thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICE
        os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness))
