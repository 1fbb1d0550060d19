"""`sparse_all_gather` and `sparse_reduce_scatter` against numpy, bit for bit, on 1 to 5 ranks."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from hecate.collectives import functional
from hecate.placement import Placement, Topology
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
    """Several calls under way at once, waited for in another order than they were issued."""
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
    """The gradient of each is the other, applied to what came from above."""
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


def use_a_group_for_a_while() -> None:
    src = Placement.from_owners([0, 1], 2)
    topology = Topology(2, 2)
    group = dist.new_group([0, 1])
    hecate.sparse_all_gather(torch.zeros(1, 4), src, src, group, topology)
    transport = weakref.ref(functional._transport(group, topology, "cpu"))
    assert transport() is not None
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert transport() is None


def test_a_destroyed_group_leaves_no_transport(groups: Groups) -> None:
    groups(2).run(use_a_group_for_a_while)


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


def disagree(what: str) -> str:
    """Rank 1 calls with something else; the message that every rank gets."""
    odd = dist.get_rank() == 1
    src = Placement.from_owners([0, 1, 2], 3)
    dst = Placement(np.eye(3) if odd and what == "placement" else np.ones((3, 3)))
    rows = torch.zeros(
        (1, 5 if odd and what == "chunk" else 4),
        dtype=torch.float64 if odd and what == "dtype" else torch.float32,
    )
    with mock.patch.dict(os.environ, HECATE_DEBUG="1"), pytest.raises(RuntimeError) as caught:
        hecate.sparse_all_gather(rows, src, dst)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("placement", "sparse_all_gather: rank 1 has another placement than the other ranks"),
        ("chunk", "sparse_all_gather: rank 1 has another chunk shape (5,) than the other ranks' (4,)"),
        ("dtype", "sparse_all_gather: rank 1 has another dtype torch.float64 than the other ranks' torch.float32"),
    ],
)
def test_debug_names_the_rank_that_differs(groups: Groups, what: str, message: str) -> None:
    assert groups(3).run(disagree, what) == [message] * 3


def another_chunk() -> None:
    src, dst = Placement.from_owners([0], 2), Placement(np.ones((1, 2)))
    held = len(src.held_by(dist.get_rank()))
    with pytest.raises(ValueError, match="a chunk is 4000 bytes on rank 0 and 4004 bytes on rank 1"):
        hecate.sparse_all_gather(torch.zeros(held, 1000 + dist.get_rank()), src, dst)


def test_a_chunk_size_that_differs_is_an_error(groups: Groups) -> None:
    groups(2).run(another_chunk)
