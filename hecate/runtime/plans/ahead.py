"""Plans the next step's copies in threads while the backward pass runs. The threads issue no communication.

A step always waits for its plans, and a plan depends only on integers. So the timing of threads does not change plans.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from hecate.placement import Placement
from hecate.runtime.plans.layer import LayerPlans, Outlook

__all__ = ["PlanAhead"]

MOST_THREADS = 4


class PlanAhead:
    """Plans all layers of a model.

    Args:
        layers: plans of each MoE layer.
        processes: processes on this machine that plan at the same time; they share its CPU cores.
    """

    def __init__(self, layers: Sequence[LayerPlans], processes: int) -> None:
        self._layers = tuple(layers)
        threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // processes))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="hecate-plan")
        self._started: list[tuple[Outlook, Future[Placement]]] = []

    def start(self) -> None:
        """Start to plan from the loads known so far; replaces what was started before."""
        for _, future in self._started:
            future.cancel()
        outlooks = [layer.outlook() for layer in self._layers]
        self._started = [(outlook, self._threads.submit(outlook.placement)) for outlook in outlooks]

    def placements(self) -> list[Placement]:
        """One placement per layer for the step that begins now.

        Plans that were started before are used if their inputs have not changed since.
        """
        if not self._started:
            self.start()
        begun, self._started = self._started, []
        futures = []
        for layer, (before, future) in zip(self._layers, begun, strict=True):
            outlook = layer.outlook()
            futures.append(future if before.equals(outlook) else self._threads.submit(outlook.placement))
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads; plans that were started are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
