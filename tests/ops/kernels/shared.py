"""What the tests of kernels share: thread orders, and matrices whose rows are aligned to 16 bytes or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hecate.ops.kernels.launch import ThreadOrder

ORDERS: tuple[ThreadOrder, ...] = ("ascending", "descending", "shuffled")
orders = pytest.mark.parametrize("order", ORDERS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASTS = (
    *((dtype, dtype) for dtype in (*DTYPES, torch.float64, torch.uint8)),
    *((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)),
    *((torch.float32, torch.float16), (torch.float16, torch.float32)),
)
WIDTHS = (1, 7, 64, 200, 2056)
"""Odd ones, multiples of 16 bytes, a multiple with a rest, and more than the threads of a row take at once."""


def matrix(rows: int, width: int, dtype: torch.dtype, seed: int = 0, misaligned: bool = False) -> Tensor:
    """Random rows; misaligned: a view into a wider matrix, whose rows begin at odd elements."""
    wide = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wide = (wide * 8).to(dtype)
    return wide[:, 1 : 1 + width] if misaligned else wide[:, :width].contiguous()


def same_bits(a: Tensor, b: Tensor) -> None:
    """Equal in shape, dtype and every value."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
