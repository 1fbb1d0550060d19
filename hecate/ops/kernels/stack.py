"""Rows of experts, all weight kinds in one launch: owned rows into chunks, and gradients of chunks into owned rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hecate.ops.kernels.launch import (
    THREADS,
    VECTOR_BYTES,
    Argument,
    Launch,
    ThreadOrder,
    batches,
    blocks_for,
    cast_name,
    check_rows,
    dtype_name,
    run,
    to_device,
)

__all__ = ["Contributions", "KindRows", "accumulate_rows", "pack_rows"]

MAX_KINDS = 16  # kKinds in csrc/cuda/stack.cuh
PIECE = 16384  # kPiece
ACCUMULATE_BLOCKS = 32
"""CTAs, hence at most as many SMs, that add contributions which lie in the memory of other devices."""


@dataclass(frozen=True)
class KindRows:
    """The rows of one weight kind.

    Attributes:
        rows: `[n, numel]`, each row contiguous: the kind's own tensor.
        offset: place of the kind in a chunk, in elements.
    """

    rows: Tensor
    offset: int


@dataclass(frozen=True)
class Contributions:
    """Gradient chunks of one expert.

    Attributes:
        row: row of the expert in each kind's tensor.
        chunks: `[chunk]` from each contributing rank, ascending, all of one dtype.
        nodes: node of each rank.
    """

    row: int
    chunks: Sequence[Tensor]
    nodes: Sequence[int]


def pack_rows(
    kinds: Sequence[KindRows], chunks: Tensor, index: Tensor | None = None, order: ThreadOrder = "ascending"
) -> None:
    """Copy rows of all kinds into chunks, cast; padding between the kinds is not written.

    Args:
        kinds: at most 16 per launch, more take more launches; all of one dtype.
        chunks: `[m, chunk]`, rows contiguous; written.
        index: int64 `[m]`, row of each kind's tensor that chunk gets; None: the first m rows.
        order: of emulated threads.
    """
    check_rows("pack_rows: chunks", chunks)
    for some in batches(kinds, MAX_KINDS):
        source = _one_dtype("pack_rows", some)
        name = cast_name("pack_rows", source, chunks.dtype)
        args = (index, chunks, chunks.stride(0), chunks.shape[0], *_table(some, [chunks]))
        _run(f"pack_{name}", chunks.shape[0], some, args, chunks.device, order)


def accumulate_rows(
    kinds: Sequence[KindRows],
    contributions: Sequence[Contributions],
    scale: float = 1.0,
    overwrite: bool = False,
    order: ThreadOrder = "ascending",
    blocks: int | None = None,
) -> None:
    """Add gradient chunks to the owner's rows, `row += scale * sum`, in the order of `collectives.summation`.

    That is: the ranks of a node ascending, then the nodes ascending, in float32 (float64 for float64). Nothing is
    staged; with `overwrite` nothing needs to be zero before.

    Args:
        kinds: at most 16 per launch, more take more launches; float32, or float64 if the chunks are.
        contributions: per expert; the chunks must stay alive until the launch has run on its stream.
        scale: factor of the sums.
        overwrite: whether rows become `scale * sum` instead.
        order: of emulated threads.
        blocks: most CTAs to launch; None: as many as fill the device.

    Raises:
        ValueError: ranks of a node are not consecutive.
        TypeError: the rows are not in the dtype that the chunks are added in, or the chunks have several dtypes or
            one without a kernel.
    """
    given = [c for c in contributions if c.chunks]
    if not given or not kinds:
        return
    _check_contributions(given)
    chunks = [chunk for c in given for chunk in c.chunks]
    double = chunks[0].dtype == torch.float64
    name = "f64" if double else dtype_name("accumulate_rows: chunks", chunks[0].dtype)
    added_in, device = torch.float64 if double else torch.float32, kinds[0].rows.device
    first = np.cumsum([0, *(len(c.chunks) for c in given)]).tolist()
    lists = ([c.row for c in given], first, [c.data_ptr() for c in chunks], [n for c in given for n in c.nodes])
    table = to_device([number for numbers in lists for number in numbers], device)
    parts = table.split([len(numbers) for numbers in lists])
    for some in batches(kinds, MAX_KINDS):
        if (found := _one_dtype("accumulate_rows", some)) != added_in:
            raise TypeError(f"accumulate_rows: rows are {found}, must be {added_in}")
        args = (*parts, len(given), overwrite, float(scale), *_table(some, chunks))
        _run(f"accumulate_{name}", len(given), some, args, device, order, blocks)


def _check_contributions(contributions: Sequence[Contributions]) -> None:
    dtypes = {chunk.dtype for c in contributions for chunk in c.chunks}
    if len(dtypes) > 1:
        raise TypeError(f"accumulate_rows: chunks have the dtypes {', '.join(sorted(map(str, dtypes)))}, must have one")
    for c in contributions:
        if len(c.nodes) != len(c.chunks) or list(c.nodes) != sorted(c.nodes):
            raise ValueError(f"accumulate_rows: row {c.row}: nodes {list(c.nodes)} must ascend, one per chunk")


def _run(
    kernel: str,
    rows: int,
    kinds: Sequence[KindRows],
    args: tuple[Argument, ...],
    device: torch.device,
    order: ThreadOrder,
    most: int | None = None,
) -> None:
    pieces = rows * sum(-(-k.rows.shape[1] // PIECE) for k in kinds)
    blocks = blocks_for(pieces, device) if most is None else min(pieces, most)
    run(Launch("stack", kernel, blocks, (THREADS, 1), 0, args), device, order)


def _one_dtype(what: str, kinds: Sequence[KindRows]) -> torch.dtype:
    dtypes = {k.rows.dtype for k in kinds}
    if len(dtypes) > 1:
        raise TypeError(f"{what}: kinds have the dtypes {', '.join(sorted(map(str, dtypes)))}, must have one")
    return dtypes.pop()


def _table(kinds: Sequence[KindRows], chunks: Sequence[Tensor]) -> tuple[Argument, ...]:
    """The struct `Kinds`; `chunks` are matrices of chunks, or single ones."""
    for k in kinds:
        check_rows("expert rows", k.rows)
    fields = (
        [k.rows for k in kinds],
        [k.rows.stride(0) for k in kinds],
        [k.offset for k in kinds],
        [k.rows.shape[1] for k in kinds],
        [_aligned(k, chunks) for k in kinds],
    )
    return (len(kinds), *([*field, *[0] * (MAX_KINDS - len(kinds))] for field in fields))


def _aligned(kind: KindRows, chunks: Sequence[Tensor]) -> bool:
    """Whether every row of the kind begins at a multiple of 16 bytes, in its tensor and in all chunks."""
    begins = [kind.rows.data_ptr(), kind.rows.stride(0) * kind.rows.element_size()]
    for chunk in chunks:
        begins.append(chunk.data_ptr() + kind.offset * chunk.element_size())
        if chunk.dim() > 1:
            begins.append(chunk.stride(0) * chunk.element_size())
    return all(begin % VECTOR_BYTES == 0 for begin in begins)
