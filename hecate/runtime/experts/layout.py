"""Layout of the weights of one expert in a flat chunk.

A chunk concatenates the expert's weight kinds ("up", "down", ...), each flattened and padded to a multiple of `ALIGN`
elements. So a buffer of chunks has one view per kind, which grouped matrix products accept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from hecate.experts import WeightSpec
from hecate.ops.kernels.registered import pack_rows

__all__ = ["ChunkLayout"]

ALIGN = 16
"""In elements. 16 elements of bf16 are 32 bytes; grouped matrix products on CUDA need an alignment of 16 bytes."""


class ChunkLayout:
    """Offsets of the given weight kinds in a flat chunk of `numel` elements.

    Args:
        weights: the weight kinds.
        kernels: whether Hecate's kernel packs stacks, all kinds in one launch.
    """

    def __init__(self, weights: Sequence[WeightSpec], kernels: bool = False) -> None:
        self.weights = tuple(weights)
        self._kernels = kernels
        self._start: dict[str, int] = {}
        self.numel = 0
        for w in self.weights:
            self._start[w.kind] = self.numel
            self.numel += -(-math.prod(w.shape) // ALIGN) * ALIGN

    def offset(self, kind: str) -> int:
        """Where a kind begins in a chunk, in elements."""
        return self._start[kind]

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Views kind -> `[n, *shape]` into `rows [n, numel]`."""
        return {w.kind: self._part(rows, w).unflatten(1, w.shape) for w in self.weights}

    def pack(self, weights: Mapping[str, Sequence[Tensor] | Tensor], rows: Tensor) -> None:
        """Copy (and cast) weights into `rows [n, numel]`; padding is not written.

        Args:
            weights: kind -> a stack `[n, *shape]`, or n tensors `[*shape]`.
            rows: the chunks.
        """
        given = [weights[w.kind] for w in self.weights]
        stacks = [stack for stack in given if isinstance(stack, Tensor)]
        if self._kernels and len(stacks) == len(given) and len({stack.dtype for stack in stacks}) == 1:
            pack_rows(stacks, list(self._start.values()), rows)
            return
        for stack, view in zip(given, self.views(rows).values(), strict=True):
            if isinstance(stack, Tensor):
                view.copy_(stack)
                continue
            for row, weight in zip(view, stack, strict=True):
                row.copy_(weight)

    def _part(self, rows: Tensor, weight: WeightSpec) -> Tensor:
        start = self._start[weight.kind]
        return rows[:, start : start + math.prod(weight.shape)]
