"""The kernels that pack experts' rows and accumulate their gradients, on the CPU, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hecate.collectives.summation import ordered_sum
from hecate.ops.kernels.launch import ThreadOrder
from hecate.ops.kernels.stack import Contributions, KindRows, accumulate_rows, pack_rows
from hecate.placement import Topology
from tests.ops.kernels.shared import CASTS, ORDERS, matrix, orders, same_bits

NUMELS = (40_000, 16, 7, 16384)
"""Elements per kind: several pieces with a rest, one vector, less than one, exactly one piece."""


def kinds_of(rows: int, dtype: torch.dtype, numels: tuple[int, ...] = NUMELS, align: int = 16) -> list[KindRows]:
    kinds, offset = [], 0
    for seed, numel in enumerate(numels):
        kinds.append(KindRows(matrix(rows, numel, dtype, seed), offset))
        offset += -(-numel // align) * align
    return kinds


def chunk_numel(kinds: list[KindRows], align: int = 16) -> int:
    return sum(-(-k.rows.shape[1] // align) * align for k in kinds)


@pytest.mark.parametrize(("source", "target"), CASTS)
@pytest.mark.parametrize("align", [1, 16])
def test_pack(source: torch.dtype, target: torch.dtype, align: int) -> None:
    kinds = kinds_of(5, source, align=align)
    index = torch.tensor([3, 0, 3])
    for wanted, order in ((None, "descending"), (index, "shuffled")):
        chunks = torch.ones(3, chunk_numel(kinds, align), dtype=target)
        pack_rows(kinds, chunks, wanted, order)
        expected = torch.ones_like(chunks)
        for k in kinds:
            rows = k.rows[:3] if wanted is None else k.rows[wanted]
            expected[:, k.offset : k.offset + k.rows.shape[1]] = rows.to(target)
        same_bits(chunks, expected)  # padding is left as it was


def test_more_kinds_than_one_launch_takes() -> None:
    kinds = kinds_of(2, torch.float32, tuple(range(1, 41)))
    chunks = torch.zeros(2, chunk_numel(kinds), dtype=torch.bfloat16)
    pack_rows(kinds, chunks)
    for k in kinds:
        same_bits(chunks[:, k.offset : k.offset + k.rows.shape[1]], k.rows.bfloat16())


def test_no_rows() -> None:
    pack_rows(kinds_of(0, torch.float32), torch.zeros(0, 56_432))
    accumulate_rows(kinds_of(2, torch.float32), [Contributions(0, [], [])])


@orders
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overwrite", [False, True])
def test_accumulate_adds_as_the_collectives_do(dtype: torch.dtype, overwrite: bool, order: ThreadOrder) -> None:
    double = dtype == torch.float64
    topology, scale = Topology(8, 2), 0.5 if double else 0.3
    kinds = kinds_of(4, torch.float64 if double else torch.float32)
    contributions, expected = [], [k.rows.clone() for k in kinds]
    for row, ranks in ((2, (0, 1, 2, 5, 6, 7)), (0, (3,)), (3, (1, 4))):
        rows = {rank: matrix(1, chunk_numel(kinds), dtype, seed=100 * row + rank)[0] for rank in ranks}
        contributions.append(Contributions(row, list(rows.values()), [topology.node_of(rank) for rank in ranks]))
        total = ordered_sum(rows, topology)
        for k, into in zip(kinds, expected, strict=True):
            part = total[k.offset : k.offset + k.rows.shape[1]]
            # One rounding of grad + scale * sum, as a fused multiply-add gives; float64 holds the product exactly.
            before = torch.zeros_like(into[row]) if overwrite else into[row]
            into[row] = fused(torch.tensor(scale, dtype=torch.float32), part, before).to(into.dtype)
    accumulate_rows(kinds, contributions, scale, overwrite, order, blocks=None if overwrite else 3)
    for k, wanted in zip(kinds, expected, strict=True):
        same_bits(k.rows, wanted)


def fused(scale: Tensor, x: Tensor, add: Tensor) -> Tensor:
    """Scale * x + add with one rounding, but for double rounding in rare ties, which these seeds do not have.

    In float64 the product is exact only for powers of two.
    """
    return (scale.double() * x.double() + add.double()).to(x.dtype)


def test_without_scale_the_bits_are_those_of_the_pools_sum() -> None:
    topology, kinds = Topology(4, 4), kinds_of(1, torch.float32, (1000,))
    rows = {rank: matrix(1, 1008, torch.bfloat16, seed=rank)[0] for rank in range(4)}
    expected = kinds[0].rows[0].clone().add_(ordered_sum(rows, topology)[:1000], alpha=1.0)
    accumulate_rows(kinds, [Contributions(0, list(rows.values()), [0] * 4)])
    same_bits(kinds[0].rows[0], expected)


def test_a_single_contribution_keeps_the_sign_of_zero() -> None:
    rows = torch.ones(1, 7)
    accumulate_rows([KindRows(rows, 0)], [Contributions(0, [torch.full((7,), -0.0)], [0])], overwrite=True)
    assert torch.signbit(rows).all()


def test_bad_input_is_named() -> None:
    kinds, chunk = kinds_of(2, torch.float32), torch.zeros(56_432)
    with pytest.raises(ValueError, match=r"row 1: nodes \[1, 0\] must ascend, one per chunk"):
        accumulate_rows(kinds, [Contributions(1, [chunk, chunk], [1, 0])])
    with pytest.raises(TypeError, match=r"chunks have the dtypes torch.bfloat16, torch.float32, must have one"):
        accumulate_rows(kinds, [Contributions(1, [chunk, chunk.bfloat16()], [0, 0])])
    with pytest.raises(TypeError, match=r"rows are torch.bfloat16, must be torch.float32"):
        accumulate_rows(kinds_of(2, torch.bfloat16), [Contributions(1, [chunk], [0])])
    with pytest.raises(TypeError, match=r"pack_rows: dtype torch.float64; the kernels compute in"):
        pack_rows(kinds, torch.zeros(2, 56_432, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"rows are torch.float32, must be torch.float64"):
        accumulate_rows(kinds, [Contributions(1, [chunk.double()], [0])])


def test_every_order_of_threads_is_tried() -> None:
    assert ORDERS == ("ascending", "descending", "shuffled")
