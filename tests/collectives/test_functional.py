"""`sparse_all_gather` and `sparse_reduce_scatter` against numpy, bit for bit, on 1 to 5 ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from hecate.placement import Placement, Topology
from hecate.ranks.same import described
from tests.collectives.reference import Case, gathered, reduced
from tests.workers import Groups

LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (5, 1), (5, 5)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16]
SEEDS = range(12)


def call(function: Callable, *args: object, async_op: bool) -> Tensor:
    result = function(*args, async_op=async_op)
    return result.wait() if async_op else result


def check_both(devices: int, per_node: int, dtype: torch.dtype, async_op: bool) -> None:
    rank = dist.get_rank()
    for seed in SEEDS:
        case = Case.random(devices, per_node, seed)
        shard, grads = case.rows(case.src, rank, dtype), case.rows(case.dst, rank, dtype)
        args = (None, case.topology)
        got = call(hecate.sparse_all_gather, shard, case.src, case.dst, *args, async_op=async_op)
        same_bits(got, gathered(case, rank, dtype), f"gather, seed {seed}")
        got = call(hecate.sparse_reduce_scatter, grads, case.dst, case.src, *args, async_op=async_op)
        same_bits(got, reduced(case, rank, dtype), f"reduce, seed {seed}")


def same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, what
    assert torch.equal(got, expected), what


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.int64])
@pytest.mark.parametrize(("devices", "per_node"), LAYOUTS)
def test_equals_numpy(groups: Groups, devices: int, per_node: int, dtype: torch.dtype, async_op: bool) -> None:
    groups(devices).run(check_both, devices, per_node, dtype, async_op)


def check_bool_gather() -> None:
    src, dst = Placement.from_owners([1, 0], 2), Placement(np.ones((2, 2)))
    rank = dist.get_rank()
    shard = torch.tensor([[rank == 0, True, False]])
    got = hecate.sparse_all_gather(shard, src, dst)
    assert got.tolist() == [[False, True, False], [True, True, False]]
    with pytest.raises(TypeError, match=r"torch\.bool has no sum"):
        hecate.sparse_reduce_scatter(got, dst, src)


def test_bool_travels_but_has_no_sum(groups: Groups) -> None:
    groups(2).run(check_bool_gather)


def check_overlapping_works(devices: int) -> None:
    """Several calls in progress at once, waited for in a different order than they were issued."""
    rank = dist.get_rank()
    cases = [Case.random(devices, 2, seed) for seed in range(6)]
    works = []
    for case in cases:
        shard, grads = (case.rows(p, rank, torch.float32) for p in (case.src, case.dst))
        args = (None, case.topology, True)
        works.append((hecate.sparse_all_gather(shard, case.src, case.dst, *args), gathered(case, rank, shard.dtype)))
        works.append((hecate.sparse_reduce_scatter(grads, case.dst, case.src, *args), reduced(case, rank, grads.dtype)))
    for i, (work, expected) in enumerate(works[::-1]):
        same_bits(work.wait(), expected, f"work {i} from the end")


def test_works_may_be_waited_for_in_any_order(groups: Groups) -> None:
    groups(4).run(check_overlapping_works, 4)


def check_gradients(devices: int, per_node: int, async_op: bool) -> None:
    """The gradient of each collective is the other one, applied to the incoming gradient."""
    rank, dtype = dist.get_rank(), torch.float64
    for seed in SEEDS:
        case = Case.random(devices, per_node, seed)
        args = (None, case.topology)
        shard = case.rows(case.src, rank, dtype).requires_grad_()
        out = call(hecate.sparse_all_gather, shard, case.src, case.dst, *args, async_op=async_op)
        out.backward(case.rows(case.dst, rank, dtype))
        assert shard.grad is not None
        same_bits(shard.grad, reduced(case, rank, dtype), f"gradient of gather, seed {seed}")
        grads = case.rows(case.dst, rank, dtype).requires_grad_()
        out = call(hecate.sparse_reduce_scatter, grads, case.dst, case.src, *args, async_op=async_op)
        out.backward(case.rows(case.src, rank, dtype))
        assert grads.grad is not None
        same_bits(grads.grad, gathered(case, rank, dtype), f"gradient of reduce, seed {seed}")


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize(("devices", "per_node"), [(1, 1), (3, 3), (4, 2)])
def test_each_is_the_others_gradient(groups: Groups, devices: int, per_node: int, async_op: bool) -> None:
    groups(devices).run(check_gradients, devices, per_node, async_op)


def check_not_contiguous() -> None:
    src, dst = Placement.from_owners([0, 1], 2), Placement(np.ones((2, 2)))
    rank = dist.get_rank()
    shard = torch.arange(12.0).view(1, 3, 4).transpose(1, 2) + rank
    got = hecate.sparse_all_gather(shard, src, dst)
    base = torch.arange(12.0).view(3, 4).T
    same_bits(got, torch.stack([base, base + 1]), "transposed shard")


def test_rows_need_not_be_contiguous(groups: Groups) -> None:
    groups(2).run(check_not_contiguous)


# Bad input.


def check_errors() -> None:
    src, dst = Placement.from_owners([0, 1, 1], 2), Placement(np.ones((3, 2)))
    rows = torch.zeros(1 + dist.get_rank(), 4)
    with pytest.raises(ValueError, match=r"passes rows of shape \(3, 4\), src gives it [12] experts"):
        hecate.sparse_all_gather(torch.zeros(3, 4), src, dst)
    with pytest.raises(ValueError, match="expert 0 is on 2 devices, must be on exactly 1"):
        hecate.sparse_all_gather(torch.zeros(3, 4), dst, dst)
    with pytest.raises(ValueError, match="group's 2 ranks as devices"):
        hecate.sparse_all_gather(rows, Placement.from_owners([0, 1, 2], 3), Placement(np.ones((3, 3))))
    with pytest.raises(ValueError, match="num_devices=3, the process group 2 ranks"):
        hecate.sparse_all_gather(rows, src, dst, None, Topology(3, 1), True)


def test_bad_input_is_named(groups: Groups) -> None:
    groups(2).run(check_errors)


def test_needs_a_process_group() -> None:
    src = Placement.from_owners([0], 1)
    with pytest.raises(RuntimeError, match="no process group"):
        hecate.sparse_all_gather(torch.zeros(1, 1), src, src)


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def disagree(what: str) -> str:
    """Rank 1 passes something else; returns the error message, which must be the same on every rank."""
    odd = dist.get_rank() == 1
    src = Placement.from_owners([0, 1, 2], 3)
    dst = Placement(np.eye(3) if odd and what == "placement" else np.ones((3, 3)))
    rows = torch.zeros(
        (2 if odd and what == "rows" else 1, 5 if odd and what == "chunk" else 4),
        dtype=torch.float64 if odd and what == "dtype" else torch.float32,
    )
    topology = Topology(3, 3 if odd and what == "nodes" else 1)
    return message_of(lambda: hecate.sparse_all_gather(rows, src, dst, None, topology))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("placement", "sparse_all_gather: dst is ALL on rank 0 and EYE on rank 1; all ranks must pass the same"),
        ("chunk", "sparse_all_gather: chunk shape is (4,) on rank 0 and (5,) on rank 1; all ranks must pass the same"),
        (
            "dtype",
            "sparse_all_gather: dtype is torch.float32 on rank 0 and torch.float64 on rank 1; "
            "all ranks must pass the same",
        ),
        ("nodes", "sparse_all_gather: devices per node is 1 on rank 0 and 3 on rank 1; all ranks must pass the same"),
        (
            "rows",
            "sparse_all_gather: rank 1 passes rows of shape (2, 4), src gives it 1 experts; "
            "they must be one row per expert",
        ),
    ],
)
def test_a_rank_that_differs_is_named_on_all(groups: Groups, what: str, message: str) -> None:
    for name, matrix in (("ALL", np.ones((3, 3))), ("EYE", np.eye(3))):
        message = message.replace(name, described(Placement(matrix)))
    assert groups(3).run(disagree, what) == [f"ValueError: {message}"] * 3


def disagree_on_known_chunks() -> list[str]:
    """Both shapes were checked across ranks in earlier calls."""
    rank = dist.get_rank()
    src, dst = Placement.from_owners([0], 2), Placement([[True, True]])
    for numel in (1000, 1001):
        hecate.sparse_all_gather(torch.ones(1 - rank, numel), src, dst)
    odd = 1000 + rank
    return [
        message_of(lambda: hecate.sparse_all_gather(torch.ones(1 - rank, odd), src, dst)),
        message_of(lambda: hecate.sparse_reduce_scatter(torch.ones(1, odd), dst, src)),
        message_of(lambda: hecate.sparse_all_gather(torch.ones(1 - rank, 1000), src, dst)),
    ]


def test_a_known_chunk_that_differs_is_named_on_all(groups: Groups) -> None:
    differs = "chunk shape is (1000,) on rank 0 and (1001,) on rank 1; all ranks must pass the same"
    for messages in groups(2).run(disagree_on_known_chunks):
        assert messages == [
            f"ValueError: sparse_all_gather: {differs}",
            f"ValueError: sparse_reduce_scatter: {differs}",
            "no error",
        ]


NO_SUM = [torch.bool, torch.float8_e8m0fnu]


def reduce_what_has_no_sum(dtype: torch.dtype) -> str:
    src, dst = Placement(np.ones((1, 2))), Placement.from_owners([0], 2)
    return message_of(lambda: hecate.sparse_reduce_scatter(torch.ones(1, 4).to(dtype), src, dst))


@pytest.mark.parametrize("dtype", NO_SUM)
def test_a_dtype_without_sum_is_named_on_all(groups: Groups, dtype: torch.dtype) -> None:
    for message in groups(2).run(reduce_what_has_no_sum, dtype):
        assert message.startswith(f"TypeError: sparse_reduce_scatter: dtype {dtype} has no sum; convert to one of ")


NARROW_FLOATS = {
    **dict.fromkeys([torch.float8_e4m3fn, torch.float8_e4m3fnuz], 16),
    **dict.fromkeys([torch.float8_e5m2, torch.float8_e5m2fnuz], 8),
}
"""Each dtype with the least power of two to which adding 1 changes nothing."""
WIDE_UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


def check_what_torch_does_not_add(dtype: torch.dtype) -> None:
    """Two experts on four ranks, owned by rank 3, to which 1 cannot be added in `dtype`; 2 can, or wraps around."""
    base = NARROW_FLOATS.get(dtype) or torch.iinfo(dtype).max
    rank = dist.get_rank()
    mine = [[base, 1, 1, 2][rank]] * 3
    rows = [mine] * (2 if rank < 3 else 1)
    grads = torch.tensor(rows).to(dtype) if dtype.is_floating_point else torch.tensor(rows, dtype=dtype)
    holders = Placement([[True, True, True, False], [True] * 4])
    owners = Placement.from_owners([3, 3], 4)
    got = hecate.sparse_reduce_scatter(grads, holders, owners, None, Topology(4, 2))
    assert got.dtype == dtype
    sums = [base + 2, base + 4] if dtype.is_floating_point else [1, 3]
    values = (got.double() if dtype.is_floating_point else got).tolist()
    assert values == ([[s] * 3 for s in sums] if rank == 3 else [])


@pytest.mark.parametrize("dtype", [*NARROW_FLOATS, *WIDE_UNSIGNED])
def test_sums_that_torch_does_not_take_are_taken_wider(groups: Groups, dtype: torch.dtype) -> None:
    groups(4).run(check_what_torch_does_not_add, dtype)
