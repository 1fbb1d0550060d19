"""Tensors of 2^31 elements and more, on the CPU: memory that nobody touches takes none, so only a few rows are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hecate.ops.kernels.activations import activate, activate_backward
from hecate.ops.kernels.rows import combine_backward, combine_rows, gather_rows, scatter_rows
from hecate.ops.kernels.stack import Contributions, KindRows, accumulate_rows, pack_rows
from hecate.ops.kernels.tokens import count_experts
from tests.ops.kernels.shared import matrix, same_bits

WIDTH, ROWS = 2**20, 2**11 + 2
"""Of a matrix whose last rows begin behind element 2^31."""
FAR = 2**31 + 16
"""Elements between two rows."""


def sparse(folder: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros in a file with holes, which count as no memory."""
    path = folder / f"{len(list(folder.iterdir()))}"
    with path.open("wb") as file:
        file.truncate(numel * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


def far_rows(folder: Path, values: Tensor) -> Tensor:
    """The two rows of `values`, `FAR` elements apart."""
    rows = sparse(folder, FAR + values.shape[1], values.dtype).as_strided((2, values.shape[1]), (FAR, 1))
    return rows.copy_(values)


def test_rows_of_tokens(tmp_path: Path) -> None:
    x = sparse(tmp_path, ROWS * WIDTH, torch.uint8).view(ROWS, WIDTH)
    x[[0, ROWS - 1]] = few = torch.randint(256, (2, WIDTH), dtype=torch.uint8)
    same_bits(gather_rows(x, torch.tensor([ROWS - 1, 0, ROWS - 2])), torch.stack([few[1], few[0], x[1]]))
    out = scatter_rows(few, torch.tensor([0, -1, -1, ROWS - 1]), 2, ROWS)
    same_bits(out[[0, ROWS - 1]], few)


def test_sums_of_rows(tmp_path: Path) -> None:
    rows = sparse(tmp_path, ROWS * WIDTH, torch.bfloat16).view(ROWS, WIDTH)
    rows[[0, ROWS - 1]] = few = matrix(2, WIDTH, torch.bfloat16)
    inverse, weights = torch.tensor([ROWS - 1, 0]), torch.tensor([[0.5, 2.0]])
    same_bits(combine_rows(rows, inverse, weights, 2)[0], (few[1].float() * 0.5 + few[0].float() * 2).bfloat16())
    grad = matrix(1, WIDTH, torch.bfloat16, seed=1)
    grad_rows, grad_weights = combine_backward(grad, rows, inverse, weights)
    same_bits(grad_rows[[ROWS - 1, 0]], torch.cat([grad * 0.5, grad * 2]))
    torch.testing.assert_close(grad_weights, (few.flip(0).double() @ grad[0].double()).float()[None], rtol=1e-4, atol=1)


def test_activations(tmp_path: Path) -> None:
    x, grad = matrix(2, 64, torch.bfloat16), matrix(2, 32, torch.bfloat16, seed=1)
    far, far_grad = far_rows(tmp_path, x), far_rows(tmp_path, grad)
    same_bits(activate(far, "silu", True), activate(x, "silu", True))
    same_bits(activate_backward(far_grad, far, "silu", True), activate_backward(grad, x, "silu", True))


def test_rows_of_experts(tmp_path: Path) -> None:
    values = matrix(2, 40_000, torch.float32)
    rows, chunks = far_rows(tmp_path, values), far_rows(tmp_path, torch.zeros(2, 40_016, dtype=torch.bfloat16))
    pack_rows([KindRows(rows, 16)], chunks)
    same_bits(chunks[:, 16:], values.bfloat16())
    chunk = matrix(1, 40_016, torch.bfloat16, seed=1)[0]
    accumulate_rows([KindRows(rows, 16)], [Contributions(1, [chunk], [0])])
    same_bits(rows, values + torch.stack([torch.zeros(40_000), chunk[16:].float()]))
    offset = FAR  # of a kind in a chunk
    chunk = sparse(tmp_path, FAR + 40_000, torch.bfloat16)
    chunk[offset:] = values[0].bfloat16()
    accumulate_rows([KindRows(rows, offset)], [Contributions(1, [chunk], [0])], overwrite=True)
    same_bits(rows[1], values[0].bfloat16().float())


def test_more_copies_than_the_sort_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"index: 2147483648 token copies on one device, must be fewer than 2\*\*31"):
        count_experts(torch.zeros(1, 1, dtype=torch.int64).expand(2**31, 1), 4)
