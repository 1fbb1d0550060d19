"""Plans the next step's copies and their routes in threads while the backward pass runs. They issue no communication.

A step always waits for its plans, and a plan depends only on integers. So the timing of threads does not change plans.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from hecate.placement import Placement
from hecate.runtime.experts.copies import LayerExperts
from hecate.runtime.plans.layer import LayerPlans, Outlook

__all__ = ["PlanAhead", "number_of_threads"]

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


class PlanAhead:
    """Plans all layers of a model.

    Args:
        layers: plans of each MoE layer.
        threads: number of threads that plan. On Linux they have a lower priority than the rest of the process.
    """

    def __init__(self, layers: Sequence[LayerPlans], threads: int) -> None:
        self._layers = tuple(layers)
        self._threads = ThreadPoolExecutor(threads, "hecate-plan", _lower_priority)
        self._started: list[tuple[Outlook, Future[Placement]]] = []

    def start(self) -> None:
        """Start to plan from the loads known so far; replaces what was started before."""
        for _, future in self._started:
            future.cancel()
        outlooks = [layer.outlook() for layer in self._layers]
        self._started = [(outlook, self._threads.submit(outlook.placement)) for outlook in outlooks]

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
                future = self._threads.submit(outlook.placement)
            futures.append(future)
        return [future.result() for future in futures]

    def make_routes(self, experts: LayerExperts, placement: Placement) -> None:
        """Start to make the routes that a placement with copies planned after the gate needs in its backward pass."""
        self._threads.submit(experts.make_routes, experts.owners, placement, gather=experts.shared is not None)

    def close(self) -> None:
        """End the threads; plans that were started are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _lower_priority() -> None:
    """Lower the priority of the calling thread; only Linux has priorities per thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICE
        os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness))
