"""The kernels on one workload: each as a call, with the bytes that it must move. `gpu_check.py` runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor

from hecate.ops.kernels.activations import activate, activate_backward
from hecate.ops.kernels.launch import to_device
from hecate.ops.kernels.quota import QuotaProblem, exact_quota
from hecate.ops.kernels.rows import combine_backward, combine_rows, gather_rows, scatter_rows
from hecate.ops.kernels.stack import Contributions, KindRows, accumulate_rows, pack_rows
from hecate.ops.kernels.symmetric import await_flags, pull_rows, signal
from hecate.ops.kernels.tokens import count_experts, sort_copies
from hecate.placement import Placement, Topology

__all__ = ["Case", "Size", "cases"]


@dataclass(frozen=True)
class Size:
    """A workload: tokens, experts per token, experts, model width, expert hidden width, experts that a device owns."""

    tokens: int
    top_k: int
    experts: int
    width: int
    hidden: int
    owned: int

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, top {self.top_k} of {self.experts}, width {self.width}, hidden {self.hidden}, "
            f"{self.owned} owned"
        )


@dataclass(frozen=True)
class Case:
    """One kernel.

    Attributes:
        name: what it does.
        run: launches it; returns its results.
        bytes_moved: what must be read and written at least, each byte once; 0: not bound by memory.
        exact: whether results must have the bits of the CPU's.
    """

    name: str
    run: Callable[[], Sequence[Tensor]]
    bytes_moved: int = 0
    exact: bool = True


def cases(size: Size, device: torch.device) -> list[Case]:
    """All kernels on tensors of `device`, with the same values on every device."""
    return [
        *_tokens(size, device),
        *_rows(size, device),
        *_stack(size, device),
        *_symmetric(size, device),
        *_activations(size, device),
        _quota(device),
    ]


def _random(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def _index(size: Size) -> Tensor:
    """Skewed choices, all experts of a token different."""
    rng = np.random.default_rng(0)
    noise = rng.gumbel(size=(size.tokens, size.experts)) - np.log1p(np.arange(size.experts))
    return torch.from_numpy(np.argpartition(-noise, size.top_k - 1)[:, : size.top_k].astype(np.int64))


def _tokens(size: Size, device: torch.device) -> list[Case]:
    index = _index(size).to(device)
    counts = np.bincount(_index(size).flatten().numpy(), minlength=size.experts)
    start = to_device(np.cumsum(counts) - counts, device)
    first, before = to_device(np.arange(size.experts + 1), device), to_device(np.zeros(size.experts, int), device)
    counted = count_experts(index, size.experts)
    return [
        Case("count", lambda: (count_experts(index, size.experts).counts,)),
        Case("sort", lambda: sort_copies(index, counted, first, before, start, index.numel())),
    ]


def _rows(size: Size, device: torch.device) -> list[Case]:
    copies, k = size.tokens * size.top_k, size.top_k
    x, grad = _random(device, size.tokens, size.width), _random(device, size.tokens, size.width, seed=1)
    rows = _random(device, copies, size.width, seed=2)
    order = torch.argsort(_index(size).flatten(), stable=True)
    inverse, order = torch.argsort(order).to(device), order.to(device)
    weights = torch.rand(size.tokens, k, generator=torch.Generator().manual_seed(3)).to(device)
    few, many = size.tokens * size.width * 2, copies * size.width * 2

    def backward() -> Sequence[Tensor]:
        return [g for g in combine_backward(grad, rows, inverse, weights) if g is not None]

    return [
        Case("permute to the wire", lambda: (scatter_rows(x, inverse, k, copies),), few + many),
        Case("permute from the wire", lambda: (gather_rows(rows, order),), 2 * many),
        Case("permute with cast", lambda: (gather_rows(rows, order, torch.float32),), 3 * many),
        Case("combine", lambda: (combine_rows(rows, inverse, weights, k),), few + many),
        Case("combine backward", backward, few + 2 * many),
    ]


def _stack(size: Size, device: torch.device) -> list[Case]:
    numels, offset = (2 * size.hidden * size.width, size.hidden * size.width), 0
    kinds = []
    for seed, numel in enumerate(numels):
        kinds.append(KindRows(_random(device, size.owned, numel, seed=seed, dtype=torch.float32), offset))
        offset += -(-numel // 16) * 16
    chunks = torch.zeros(size.owned, offset, dtype=torch.bfloat16, device=device)
    gradients = [_random(device, offset, seed=10 + rank) for rank in range(4)]
    given = [Contributions(row, gradients, [0, 0, 1, 1]) for row in range(size.owned)]

    def pack() -> Sequence[Tensor]:
        pack_rows(kinds, chunks)
        return (chunks,)

    def accumulate() -> Sequence[Tensor]:
        accumulate_rows(kinds, given, overwrite=True)  # the same result however often it runs
        return [kind.rows for kind in kinds]

    elements = size.owned * sum(numels)
    return [
        Case("pack and cast", pack, 6 * elements),
        Case("accumulate 4 gradients", accumulate, (4 * 2 + 4) * elements),
    ]


def _symmetric(size: Size, device: torch.device) -> list[Case]:
    """Rows and flags as if they were other ranks': of experts, by the kernel and by copy engines."""
    rows = _random(device, size.owned, 3 * size.hidden * size.width)
    flags, late = to_device([0] * size.experts, device), to_device([0], device)
    rank = [(flags.data_ptr() + 8 * i, i + 1) for i in range(size.experts)]

    def pull(engine_bytes: int) -> Sequence[Tensor]:
        target = torch.empty_like(rows)
        pull_rows(list(zip(rows, target, strict=True)), device, engine_bytes)
        return (target,)

    def tell() -> Sequence[Tensor]:
        signal(rank, device)
        await_flags(rank, late, timedelta(seconds=5), device)
        return flags, late

    return [
        Case("pull by the kernel", lambda: pull(2**62), 2 * rows.nbytes),
        Case("pull by copy engines", lambda: pull(1), 2 * rows.nbytes),
        Case("signal and await", tell),
    ]


def _activations(size: Size, device: torch.device) -> list[Case]:
    copies = size.tokens * size.top_k
    x = _random(device, copies, 2 * size.hidden)
    grad = _random(device, copies, size.hidden, seed=1)
    half = copies * size.hidden * 2
    return [
        Case("SwiGLU", lambda: (activate(x, "silu", True),), 3 * half, exact=False),
        Case("SwiGLU backward", lambda: (activate_backward(grad, x, "silu", True),), 5 * half, exact=False),
        Case("GELU", lambda: (activate(x, "gelu", False),), 4 * half, exact=False),
    ]


def _quota(device: torch.device) -> Case:
    """64 devices in 8 nodes, 256 experts, two copies per device of hot ones."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(40 * rng.pareto(1.2, 256), (64, 256)).astype(np.int64)
    matrix = np.zeros((256, 64), dtype=np.bool_)
    matrix[np.arange(256), np.arange(256) // 4] = True
    hottest = np.argsort(-counts.sum(axis=0))[:32]
    for column in range(64):
        matrix[rng.choice(hottest, 2, replace=False), column] = True
    problem = QuotaProblem.of(Placement(matrix), Topology(64, 8), device)
    on_device = torch.from_numpy(counts).to(device)
    return Case("quota, 64 devices, 256 experts", lambda: exact_quota(on_device, problem))
