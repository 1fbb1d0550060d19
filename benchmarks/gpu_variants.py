"""Every entry point of the kernels, in all dtypes and on small tensors; `gpu_check.py` compares them with the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.gpu_kernels import Case
from hecate.ops.kernels.activations import Activation, activate, activate_backward
from hecate.ops.kernels.rows import combine_backward, combine_rows, gather_rows, scatter_rows
from hecate.ops.kernels.stack import Contributions, KindRows, accumulate_rows, pack_rows

__all__ = ["variants"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASTS = (
    *((dtype, dtype) for dtype in (torch.uint8, BF16, F32, torch.float64)),
    *((F32, BF16), (F32, F16), (BF16, F32), (F16, F32)),
)
"""Dtypes between which rows are moved; equal ones are copied by the size of an element."""
SUMS = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32))
"""Dtypes of rows that are added, and of their sums."""
TOKENS, TOP_K, WIDTHS = 19, 3, (7, 64)
"""Widths that are no multiple of 16 bytes, and one that is."""


def variants(device: torch.device) -> Iterator[Case]:
    """A case for each kernel, dtype and width, with the same values on every device."""
    for width in WIDTHS:
        yield from _moves(device, width)
        yield from _sums(device, width)
        yield from _experts(device, width)
        yield from _activations(device, width)


def _alone(run: Callable[..., Tensor], *args: Any) -> Callable[[], Sequence[Tensor]]:
    """A call of `run`, whose result is one tensor."""
    return lambda: (run(*args),)


def _random(device: torch.device, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = 8 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.abs().to(dtype).to(device) if dtype == torch.uint8 else values.to(dtype).to(device)


def _inverse(device: torch.device) -> Tensor:
    """The row of each copy; every fifth has none."""
    inverse, kept = torch.full((TOKENS * TOP_K,), -1), torch.arange(TOKENS * TOP_K) % 5 != 0
    inverse[kept] = torch.randperm(int(kept.sum()), generator=torch.Generator().manual_seed(1))
    return inverse.to(device)


def _moves(device: torch.device, width: int) -> Iterator[Case]:
    inverse = _inverse(device)
    rows = int(inverse.max()) + 1
    index = torch.arange(2 * TOKENS, device=device) % TOKENS
    for source, target in CASTS:
        x, of = _random(device, TOKENS, width, dtype=source), f"{source} to {target}, width {width}"
        yield Case(f"scatter, {of}", _alone(scatter_rows, x, inverse, TOP_K, rows, target))
        yield Case(f"gather, {of}", _alone(gather_rows, x, index, target))


def _sums(device: torch.device, width: int) -> Iterator[Case]:
    inverse = _inverse(device)
    weights = torch.rand(TOKENS, TOP_K, generator=torch.Generator().manual_seed(2)).to(device)
    for source, target in SUMS:
        rows, of = _random(device, int(inverse.max()) + 1, width, dtype=source), f"{source} to {target}, width {width}"
        grad = _random(device, TOKENS, width, dtype=target, seed=3)
        yield Case(f"combine, {of}", _alone(combine_rows, rows, inverse, weights, TOP_K, target))
        yield Case(f"combine backward, {of}", partial(combine_backward, grad, rows, inverse, weights))


def _experts(device: torch.device, width: int) -> Iterator[Case]:
    for source, target in CASTS:
        kinds = [
            KindRows(_random(device, 3, n, dtype=source, seed=n), at) for n, at in ((5 * width, 0), (8, 5 * width))
        ]

        def pack(kinds: list[KindRows] = kinds, target: torch.dtype = target) -> tuple[Tensor]:
            chunks = torch.zeros(3, 5 * width + 8, dtype=target, device=device)
            pack_rows(kinds, chunks)
            return (chunks,)

        yield Case(f"pack, {source} to {target}, width {width}", pack)
    for dtype in (torch.float64, F32, BF16, F16):
        chunks = [_random(device, 5 * width, dtype=dtype, seed=rank) for rank in range(3)]
        wide = torch.float64 if dtype == torch.float64 else F32

        def accumulate(chunks: list[Tensor] = chunks, wide: torch.dtype = wide) -> tuple[Tensor]:
            rows = torch.ones(2, 5 * width, dtype=wide, device=device)
            accumulate_rows([KindRows(rows, 0)], [Contributions(1, chunks, [0, 0, 1])], scale=0.5)
            return (rows,)

        yield Case(f"accumulate, {dtype}, width {width}", accumulate)


def _activations(device: torch.device, width: int) -> Iterator[Case]:
    for dtype in (F32, BF16, F16):
        x, grad = _random(device, 9, 2 * width, dtype=dtype), _random(device, 9, width, dtype=dtype, seed=1)
        for kind in get_args(Activation):
            of, exact = f"{kind}, {dtype}, width {width}", kind in ("relu", "relu2")
            yield Case(f"activate, {of}", _alone(activate, x, kind, True), exact=exact)
            yield Case(
                f"activate backward, {of}",
                _alone(activate_backward, grad, x, kind, True),
                exact=exact,
            )
