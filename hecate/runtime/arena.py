"""Memory that all layers use in turn for rows that travel and for copies of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.private_torch import tensors_sharing

__all__ = ["Arena"]


@dataclass
class _Block:
    memory: Tensor
    lent: bool = True  # since the last `trim`


class Arena:
    """Lends memory until no tensor refers to it any more, so nobody has to give it back.

    What autograd has saved counts too: a graph that is retained for a second backward pass keeps its memory. Fresh
    memory costs page faults on the CPU, and on CUDA sizes that change from plan to plan split the allocator's blocks;
    this memory stays, and after a few steps no more is allocated.

    On CUDA, memory belongs to the stream that is current in `empty`, as that of `torch.empty` does: another stream that
    uses it must have been waited for before its last tensor goes (see `Pending`).

    Args:
        device: where the memory is.

    Attributes:
        num_bytes: bytes allocated now.
        peak: the most bytes that were allocated at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[_Block] = []  # ascending size
        self.num_bytes = self.peak = 0

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Uninitialized `[rows, columns]`."""
        size = rows * columns * dtype.itemsize
        if not size:
            return torch.empty(rows, columns, dtype=dtype, device=self._device)
        block = self._free(size) or self._allocate(size)
        block.lent = True
        # `.data`: autograd would have the result refer to a tensor in between, which `lent_once` would count.
        return block.memory[:size].view(dtype).view(rows, columns).data

    def lent_once(self, tensor: Tensor) -> bool:
        """Whether `tensor`, which came from `empty`, is the only one that refers to its memory."""
        return not tensor.numel() or tensors_sharing(tensor) == 2  # the tensor and the block

    def trim(self) -> None:
        """Free what was not lent since the last call: surplus that unusual passes have left."""
        self._keep([b for b in self._blocks if b.lent or tensors_sharing(b.memory) > 1])
        for block in self._blocks:
            block.lent = False

    def free(self) -> None:
        """Free all memory that nobody refers to."""
        self._keep([b for b in self._blocks if tensors_sharing(b.memory) > 1])

    def _free(self, size: int) -> _Block | None:
        """The smallest block of at least `size` bytes that nobody refers to."""
        fits = (b for b in self._blocks if b.memory.numel() >= size)
        return next((b for b in fits if tensors_sharing(b.memory) == 1), None)

    def _allocate(self, size: int) -> _Block:
        """A new block, in place of the largest of those that nobody refers to: all of them are too small."""
        unused = [b for b in self._blocks if tensors_sharing(b.memory) == 1]
        blocks = [b for b in self._blocks if not unused or b is not unused[-1]]
        del unused
        self._keep(blocks)  # before more is allocated
        with torch.inference_mode(False):  # evaluation may come first; autograd cannot save inference tensors
            block = _Block(torch.empty(size, dtype=torch.uint8, device=self._device))
        self._keep(sorted([*blocks, block], key=lambda b: b.memory.numel()))
        return block

    def _keep(self, blocks: list[_Block]) -> None:
        self._blocks = blocks
        self.num_bytes = sum(b.memory.numel() for b in blocks)
        self.peak = max(self.peak, self.num_bytes)
