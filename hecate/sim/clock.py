"""What `hecate.sim.measure` measures with: a clock for what all ranks do together, and least squares."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from hecate.ranks.messages import all_reduce

__all__ = ["SECOND", "Clock", "fit", "rate"]

SECOND = 1_000_000_000


class Clock:
    """Times what all ranks do together: the slowest rank, the median of several times. Integer nanoseconds."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self._repeats = device, repeats

    def __call__(self, call: Callable[[], object]) -> int:
        times = []
        for i in range(self._repeats + 2):
            self._settle()
            begin = time.perf_counter_ns()
            call()
            self._settle_device()
            if i >= 2:
                times.append(time.perf_counter_ns() - begin)
        slowest = torch.tensor(times, dtype=torch.int64, device=self.device)
        all_reduce(slowest, op=dist.ReduceOp.MAX)
        return int(median(slowest.tolist()))

    def _settle(self) -> None:
        all_reduce(torch.zeros(1, device=self.device))
        self._settle_device()

    def _settle_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def fit(rows: Sequence[Sequence[float]], times: Sequence[int]) -> list[float]:
    """Coefficients >= 0 of least squares of relative errors; a negative one is set to 0 and the others fitted again."""
    matrix, found = np.array(rows, dtype=np.float64), np.array(times, dtype=np.float64)
    scaled = matrix / found[:, None]
    kept = list(range(matrix.shape[1]))
    while True:
        solved, *_ = np.linalg.lstsq(scaled[:, kept], np.ones(len(found)), rcond=None)
        if (solved >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(solved.argmin()))
    values = [0.0] * matrix.shape[1]
    for place, value in zip(kept, solved, strict=True):
        values[place] = float(value)
    values[0] = max(values[0], 1e-9)
    return values


def rate(num_bytes: int, ns: int) -> int:
    """Bytes per second, at least 1."""
    return max(1, num_bytes * SECOND // max(1, ns))
