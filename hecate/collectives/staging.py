"""Memory for pieces that are being sent or received."""

from __future__ import annotations

from bisect import bisect_left, insort_left

import torch
from torch import Tensor

__all__ = ["Staging"]


class Staging:
    """A pool of buffers that are used again: on CPU, fresh memory costs a page fault every few KiB.

    It has at most as many buffers as pieces were ever in use at once, none larger than the largest piece. Buffers only
    grow, so repeated calls soon allocate nothing.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Tensor]] = {}  # bytes, ascending size

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialized `[numel]`."""
        size = numel * dtype.itemsize
        free = self._free.setdefault(device, [])
        at = bisect_left(free, size, key=Tensor.numel)
        if at < len(free):
            memory = free.pop(at)
        else:
            if free:
                free.pop()  # all are too small: the new one takes the place of the largest
            with torch.inference_mode(False):  # a call in inference mode may come first
                memory = torch.empty(size, dtype=torch.uint8, device=device)
        return memory[:size].view(dtype)

    def give(self, piece: Tensor) -> None:
        """Take back `piece`, which came from `take` and is not used any more."""
        memory = torch.empty(0, dtype=torch.uint8, device=piece.device).set_(piece.untyped_storage())
        # Before others of its size: what was used last is still in the caches.
        insort_left(self._free[piece.device], memory, key=Tensor.numel)
