"""The kernels as ops of torch's dispatcher, so that FakeTensor and torch.compile know their shapes; without autograd.

Arguments are those of the launchers beside this file; `own_*` are the fields of `OwnRows`, in their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hecate.ops.kernels import activations, quota, rows, stack, tokens
from hecate.ops.kernels.quota import QuotaProblem
from hecate.ops.kernels.rows import OwnRows
from hecate.ops.kernels.stack import KindRows
from hecate.ops.kernels.tokens import OTHER_BINS, ExpertCounts
from hecate.ops.registry import register

__all__ = [
    "activate",
    "activate_backward",
    "combine_backward",
    "combine_rows",
    "count_experts",
    "exact_quota",
    "gather_rows",
    "pack_rows",
    "scatter_rows",
    "sort_copies",
]

_CASTS = ({torch.float32, torch.bfloat16}, {torch.float32, torch.float16})
_OWN = "Tensor? own_rows, Tensor? own_index, int own_begin, int own_end, int own_top_k"


def scatter_rows(
    x: Tensor,
    inverse: Tensor,
    top_k: int,
    num_rows: int,
    dtype: torch.dtype | None = None,
    skip: tuple[int, int] = (0, 0),
) -> Tensor:
    """See `hecate.ops.kernels.rows.scatter_rows`; any strides of x, and casts for which there is no kernel."""
    dtype = dtype or x.dtype
    castable = x.dtype == dtype or {x.dtype, dtype} in _CASTS
    return _scatter(x if castable else x.to(dtype), inverse, top_k, num_rows, dtype, skip)


def gather_rows(x: Tensor, index: Tensor, dtype: torch.dtype | None = None, own: OwnRows | None = None) -> Tensor:
    """See `hecate.ops.kernels.rows.gather_rows`."""
    return _gather(x, index, dtype or x.dtype, *_fields(own))


def combine_rows(
    x: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    top_k: int,
    dtype: torch.dtype | None = None,
    own: OwnRows | None = None,
) -> Tensor:
    """See `hecate.ops.kernels.rows.combine_rows`; any strides of x, and casts for which there is no kernel."""
    dtype = dtype or x.dtype
    direct = dtype if dtype in (x.dtype, torch.float32) else x.dtype
    return _combine(x, inverse, weights, top_k, direct, *_fields(own)).to(dtype)


def count_experts(index: Tensor, num_experts: int) -> ExpertCounts:
    """See `hecate.ops.kernels.tokens.count_experts`."""
    counts, tiles = _count(index, num_experts)
    return ExpertCounts(counts, tiles)


def sort_copies(
    index: Tensor, counted: ExpertCounts, first: Tensor, before: Tensor, start: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """See `hecate.ops.kernels.tokens.sort_copies`."""
    order, inverse = _sort(index, counted.counts, counted.tiles, first, before, start, num_rows)
    return order, inverse


def exact_quota(counts: Tensor, problem: QuotaProblem) -> tuple[Tensor, Tensor]:
    """See `hecate.ops.kernels.quota.exact_quota`."""
    divided, limit = _quota(counts, problem.sizes, problem.tables)
    return divided, limit


def _fields(own: OwnRows | None) -> tuple[Any, ...]:
    return (None, None, 0, 0, 1) if own is None else (own.rows, own.index, own.begin, own.end, own.top_k)


def _own(fields: tuple[Any, ...]) -> OwnRows | None:
    return None if fields[0] is None else OwnRows(*fields)


def _contiguous_rows(x: Tensor) -> Tensor:
    """X with contiguous rows; gradients come with any strides, such as those of `expand`."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


_scatter = register(
    "scatter_rows(Tensor x, Tensor inverse, int top_k, int num_rows, ScalarType dtype, int[2] skip) -> Tensor",
    lambda x, inverse, top_k, num_rows, dtype, skip: rows.scatter_rows(
        _contiguous_rows(x), inverse, top_k, num_rows, dtype, (skip[0], skip[1])
    ),
    lambda x, inverse, top_k, num_rows, dtype, skip: x.new_empty(num_rows, x.shape[1], dtype=dtype),
)
_gather = register(
    f"gather_rows(Tensor x, Tensor index, ScalarType dtype, {_OWN}) -> Tensor",
    lambda x, index, dtype, *own: rows.gather_rows(_contiguous_rows(x), index, dtype, _own(own)),
    lambda x, index, dtype, *own: x.new_empty(index.shape[0], x.shape[1], dtype=dtype),
)

_combine = register(
    f"combine_rows(Tensor x, Tensor inverse, Tensor? weights, int top_k, ScalarType dtype, {_OWN}) -> Tensor",
    lambda x, inverse, weights, top_k, dtype, *own: rows.combine_rows(
        _contiguous_rows(x), inverse, None if weights is None else weights.contiguous(), top_k, dtype, _own(own)
    ),
    lambda x, inverse, weights, top_k, dtype, *own: x.new_empty(
        inverse.shape[0] // max(1, top_k) if weights is None else weights.shape[0], x.shape[1], dtype=dtype
    ),
)

combine_backward = register(
    "combine_rows_backward(Tensor grad, Tensor x, Tensor weights, Tensor inverse) -> (Tensor, Tensor)",
    lambda grad, x, weights, inverse: rows.combine_backward(
        _contiguous_rows(grad), _contiguous_rows(x), inverse, weights.contiguous()
    ),
    lambda grad, x, weights, inverse: (x.new_empty(x.shape), weights.new_empty(weights.shape)),
)
"""`hecate.ops.kernels.rows.combine_backward`, both gradients."""


def _counts_and_tiles(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    counted = tokens.count_experts(index.contiguous(), num_experts)
    return counted.counts, counted.tiles


_count = register(
    "count_experts(Tensor index, int num_experts) -> (Tensor, Tensor)",
    _counts_and_tiles,
    lambda index, num_experts: (
        index.new_empty(num_experts + OTHER_BINS),
        index.new_empty(tokens.blocks_of(index.numel()), num_experts + OTHER_BINS, dtype=torch.int32),
    ),
)

_sort = register(
    "sort_copies(Tensor index, Tensor counts, Tensor tiles, Tensor first, Tensor before, Tensor start, int num_rows)"
    " -> (Tensor, Tensor)",
    lambda index, counts, tiles, first, before, start, num_rows: tokens.sort_copies(
        index.contiguous(), ExpertCounts(counts, tiles), first, before, start, num_rows
    ),
    lambda index, counts, tiles, first, before, start, num_rows: (
        index.new_empty(num_rows),
        index.new_empty(index.numel()),
    ),
)

_quota = register(
    "exact_quota(Tensor counts, int[] sizes, Tensor[] tables) -> (Tensor, Tensor)",
    lambda counts, sizes, tables: quota.exact_quota(counts, QuotaProblem(tuple(sizes), tuple(tables))),
    lambda counts, sizes, tables: (counts.new_empty(sizes[0], sizes[2]), counts.new_empty(1)),
)

activate = register(
    "activate(Tensor x, str kind, bool gated) -> Tensor",
    lambda x, kind, gated: activations.activate(_contiguous_rows(x), kind, gated),
    lambda x, kind, gated: x.new_empty(x.shape[0], x.shape[1] // (2 if gated else 1)),
)
"""`act(x)`, or gated `act(x[:, :f]) * x[:, f:]`; see `hecate.ops.kernels.activations`."""

activate_backward = register(
    "activate_backward(Tensor grad, Tensor x, str kind, bool gated) -> Tensor",
    lambda grad, x, kind, gated: activations.activate_backward(
        _contiguous_rows(grad), _contiguous_rows(x), kind, gated
    ),
    lambda grad, x, kind, gated: x.new_empty(x.shape),
)
"""The gradient of `activate` in x."""


def _pack_rows(stacks: list[Tensor], offsets: list[int], chunks: Tensor) -> None:
    stack.pack_rows([KindRows(s.flatten(1), at) for s, at in zip(stacks, offsets, strict=True)], chunks)


pack_rows = register("pack_rows(Tensor[] stacks, int[] offsets, Tensor(a!) chunks) -> ()", _pack_rows, lambda *_: None)
"""Copy and cast stacks `[n, *shape]` of weights into `chunks [n, chunk]`, each kind at its offset."""
