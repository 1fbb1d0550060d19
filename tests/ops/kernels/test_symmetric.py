"""The kernels that copy rows of other devices and wait for their flags, on the CPU, in threads that wait for each
other.
"""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from hecate.ops.kernels import symmetric
from hecate.ops.kernels.launch import ThreadOrder
from hecate.ops.kernels.symmetric import await_flags, pull_rows, signal
from tests.ops.kernels.shared import orders, same_bits

CPU = torch.device("cpu")
SOON, LATE = timedelta(milliseconds=20), timedelta(seconds=60)


def words(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def flags(at: Tensor, value: int) -> list[tuple[int, int]]:
    return [(word.data_ptr(), value + i) for i, word in enumerate(at)]


@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_of_any_size_and_alignment_are_copied(dtype: torch.dtype, order: ThreadOrder) -> None:
    sizes = (0, 1, 7, 16, 1000, 32768, 70_001, 300_000)
    memory = (torch.randn(sum(sizes) + 1) * 9).to(dtype)
    for shift in (0, 1):  # aligned to 16 bytes or not
        into, pulls, at = torch.zeros_like(memory), [], shift
        expected = into.clone()
        for size in sizes:
            pulls.append((memory[at : at + size], into[at - shift : at - shift + size]))
            expected[at - shift : at - shift + size] = memory[at : at + size]
            at += size
        pull_rows(pulls, CPU, order=order)
        same_bits(into, expected)  # and nothing beside it


def test_more_rows_than_one_launch_takes() -> None:
    rows, into = torch.randn(300, 40), torch.zeros(300, 40)
    pull_rows(list(zip(rows, into, strict=True)), CPU, order="shuffled")
    same_bits(into, rows)
    pull_rows([], CPU)


def test_large_rows_may_be_copied_by_copy_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(symmetric, "run", lambda launch, *_: launched.append(launch.args[0]))
    rows, into = [torch.ones(n) for n in (4, 100, 200)], [torch.zeros(n) for n in (4, 100, 200)]
    pull_rows(list(zip(rows, into, strict=True)), CPU, engine_bytes=400)
    assert launched == [1]
    assert [int(x.sum()) for x in into] == [0, 100, 200]


@orders
def test_two_ranks_take_turns(order: ThreadOrder) -> None:
    """Each adds one to the other's row when the other's flag says that it may; a missed wait would lose a turn."""
    at, late, row, turns = words(400), words(2), torch.zeros(70_000), 30

    def rank(me: int) -> None:
        mine, theirs = (at[:200], at[200:]) if me else (at[200:], at[:200])
        for turn in range(turns):
            if turn or me:
                assert await_flags(flags(mine, turn + me), late[me : me + 1], LATE, CPU, order) is None
            copy = torch.empty_like(row)
            pull_rows([(row, copy)], CPU, order=order)
            row.copy_(copy + 1)
            signal(flags(theirs, turn + 1), CPU, order)

    threads = [threading.Thread(target=rank, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert row.eq(2 * turns).all()


def test_a_flag_that_does_not_come_is_named() -> None:
    at, late = words(300), words(1)
    signal(flags(at, 1)[:-1], CPU)
    assert await_flags(flags(at, 1)[:-1], late, LATE, CPU) is None
    assert await_flags(flags(at, 1), late, SOON, CPU) == 299
    assert await_flags([], words(1), SOON, CPU) is None


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"source torch.float32 \(3,\), target torch.float32 \(4,\); they must be"):
        pull_rows([(torch.zeros(3), torch.zeros(4))], CPU)
