"""How the weights of one expert lie in one flat chunk, and which dtypes they take on the way.

A chunk concatenates the expert's weight kinds ("up", "down", ...), each flattened and padded to a multiple of `ALIGN`
elements, so that a buffer of chunks has a view per kind that grouped matrix products accept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.ops.grouped import Groups

__all__ = ["ChunkLayout", "Dtypes", "ExpertsSpec", "WeightSpec"]

ALIGN = 16
"""Elements: 32 bytes of bf16; grouped matrix products on CUDA need 16."""

ExpertMLP = Callable[[Tensor, Groups, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class WeightSpec:
    """One weight kind of a layer's experts.

    Attributes:
        kind: its attribute on the experts module, e.g. "up".
        shape: of one expert.
        dtype: of the model's own parameter.
        trainable: whether it gets gradients.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool


@dataclass(frozen=True)
class ExpertsSpec:
    """What an adapter finds in one MoE layer.

    Attributes:
        name: of the experts module in the model; weights are called `name.kind`.
        num_experts: experts of the layer.
        width: of a token's hidden state, d.
        weights: their kinds, in a fixed order.
        mlp: `(rows [N, d] sorted by expert, groups, {kind: [experts, *shape]}) -> [N, d]`, differentiable.
    """

    name: str
    num_experts: int
    width: int
    weights: tuple[WeightSpec, ...]
    mlp: ExpertMLP


@dataclass(frozen=True)
class Dtypes:
    """Resolved precision.

    Attributes:
        master: of owned weights.
        param: of compute and copies.
        reduce: of weight gradients between devices.
        wire: of tokens, results and their gradients between devices, at most as wide as `param`; None: as computed.
    """

    master: torch.dtype
    param: torch.dtype
    reduce: torch.dtype
    wire: torch.dtype | None

    @property
    def token(self) -> torch.dtype:
        """What a token takes on the wire."""
        return self.wire or self.param


class ChunkLayout:
    """Offsets of some weight kinds in a flat chunk of `numel` elements."""

    def __init__(self, weights: Sequence[WeightSpec]) -> None:
        self.weights = tuple(weights)
        self._start: dict[str, int] = {}
        self.numel = 0
        for w in self.weights:
            self._start[w.kind] = self.numel
            self.numel += -(-math.prod(w.shape) // ALIGN) * ALIGN

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Views kind -> `[n, *shape]` into `rows [n, numel]`."""
        return {w.kind: self._part(rows, w).unflatten(1, w.shape) for w in self.weights}

    def pack(self, weights: Mapping[str, Sequence[Tensor] | Tensor], rows: Tensor) -> None:
        """Copy (and cast) kind -> n times `[*shape]` into `rows [n, numel]`; padding is left alone."""
        for kind, view in self.views(rows).items():
            stack = weights[kind]
            if isinstance(stack, Tensor):
                view.copy_(stack)
                continue
            for row, weight in zip(view, stack, strict=True):
                row.copy_(weight)

    def _part(self, rows: Tensor, weight: WeightSpec) -> Tensor:
        start = self._start[weight.kind]
        return rows[:, start : start + math.prod(weight.shape)]
