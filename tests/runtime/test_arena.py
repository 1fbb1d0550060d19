"""Arenas lend memory only while nobody else refers to it, and nothing depends on what was in it before."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor, nn

from hecate.runtime.arena import Arena
from tests.runtime.helpers import Pair, case, net, square_loss
from tests.workers import Groups

CPU = torch.device("cpu")


def test_memory_is_lent_again_when_the_last_tensor_has_gone() -> None:
    arena = Arena(CPU)
    rows = arena.empty(3, 4, torch.float32)
    assert (rows.shape, rows.dtype, arena.num_bytes) == ((3, 4), torch.float32, 48)
    assert arena.lent_once(rows)
    view, where = rows[1], rows.data_ptr()
    assert not arena.lent_once(rows)
    del rows
    other = arena.empty(3, 4, torch.float32)
    assert other.data_ptr() != where
    del view
    smaller = arena.empty(2, 4, torch.float32)
    assert smaller.data_ptr() == where
    assert arena.num_bytes == arena.peak == 96


def test_what_a_graph_has_saved_is_not_lent() -> None:
    arena = Arena(CPU)
    rows, weight = arena.empty(2, 2, torch.float32).fill_(3), nn.Parameter(torch.ones(2, 2))
    where, loss = rows.data_ptr(), (weight * rows).sum()
    del rows
    loss.backward(retain_graph=True)
    other = arena.empty(2, 2, torch.float32).fill_(5)
    loss.backward()
    assert weight.grad is not None
    assert bool((weight.grad == 6).all())
    assert arena.empty(2, 2, torch.float32).data_ptr() == where != other.data_ptr()


def test_larger_memory_takes_the_place_of_smaller() -> None:
    arena = Arena(CPU)
    for size in (10, 40, 20, 30):
        del [arena.empty(1, size, torch.uint8)][:]
    assert (arena.num_bytes, arena.peak) == (40, 40)
    with torch.inference_mode():  # an evaluation may come first
        large = arena.empty(1, 50, torch.uint8)
    del large
    assert not arena.empty(1, 50, torch.uint8).is_inference()


def test_what_was_not_lent_for_a_step_is_freed() -> None:
    arena = Arena(CPU)
    one, two = (arena.empty(1, 8, torch.uint8) for _ in range(2))
    del two
    arena.trim()
    assert arena.num_bytes == 16
    arena.trim()
    assert arena.num_bytes == 8
    del one
    arena.free()
    assert (arena.num_bytes, arena.peak) == (0, 16)


def test_nothing_has_no_memory() -> None:
    arena = Arena(CPU)
    rows = arena.empty(0, 5, torch.bfloat16)
    assert rows.shape == (0, 5)
    assert arena.lent_once(rows)
    assert arena.num_bytes == 0


EMPTY = Arena.empty


def _garbage(arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    memory = EMPTY(arena, rows, columns, dtype)
    return memory.fill_(torch.nan if dtype.is_floating_point else 255)


def _train_on_garbage() -> None:
    for changes in ({}, {"rematerialize": True}, {"mesh": (2, 1)}):
        with case(changes), patch.object(Arena, "empty", _garbage):
            pair = Pair(net(), **changes)  # type: ignore[arg-type]
            optimizers = pair.optimizers(lambda p: torch.optim.SGD(p, lr=0.1))
            for step in range(3):
                for micro_batch in range(2):
                    pair.backward(square_loss(2 * step + micro_batch))
                pair.check_gradients()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            arenas = [pair.engine._parts.copies_memory, pair.engine._parts.comms.gradients.arena]
            assert "mesh" in changes or all(arena.peak for arena in arenas)


def test_nothing_reads_what_was_there_before(groups: Groups) -> None:
    groups(2).run(_train_on_garbage)
