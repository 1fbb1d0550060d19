"""The loads of the last steps of one layer."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

__all__ = ["LoadHistory"]

Int64 = NDArray[np.int64]


class LoadHistory:
    """The counts of the last `window` steps (the paper's w) of one layer.

    The counts of a step's micro-batches are added up: call `add` per micro-batch and `close_step` after the last.
    """

    def __init__(self, num_devices: int, num_experts: int, window: int = 5) -> None:
        if window < 1:
            raise ValueError(f"LoadHistory: window={window} must be >= 1")
        self._steps: deque[Int64] = deque(maxlen=window)
        self._shape = (num_devices, num_experts)
        self._open: Int64 | None = None

    def add(self, counts: Int64) -> None:
        """Add the counts of one micro-batch, int64 `[num_devices, num_experts]`."""
        if counts.shape != self._shape:
            raise ValueError(f"LoadHistory: counts have shape {counts.shape}, must be {self._shape}")
        self._open = counts.copy() if self._open is None else self._open + counts

    def close_step(self) -> None:
        """End the step: store the counts added since the last one, and drop the oldest step beyond the window."""
        if self._open is not None:
            self._steps.append(self._open)
            self._open = None

    @property
    def steps(self) -> tuple[Int64, ...]:
        """The counts of the closed steps, oldest first; they do not change any more."""
        return tuple(self._steps)

    def array(self) -> Int64:
        """Int64 `[steps, num_devices, num_experts]` of the closed steps, oldest first."""
        return np.stack(self._steps) if self._steps else np.zeros((0, *self._shape), dtype=np.int64)
