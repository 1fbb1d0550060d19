"""Functions in which all ranks take part: an error on one rank is an error on all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch.distributed as dist

from hecate.ranks.agree import PrivateRanks, Ranks, agree, gather, on_rank_0, rank_and_world
from tests.workers import Group, Groups

Make = Callable[[], Ranks]
MAKES = {"current": Ranks.current, "private": PrivateRanks.make}


class UnsendableError(Exception):
    """An exception whose pickle cannot be read."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def raise_on(ranks: Ranks, guilty: int, error: Exception) -> str:
    def function() -> str:
        if ranks.rank >= guilty:
            raise error
        return "fine"

    try:
        return ranks.agree(function)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"


def all_of_it(kind: str) -> tuple[object, ...]:
    ranks = MAKES[kind]()
    assert (ranks.rank, ranks.size) == rank_and_world()
    return (
        ranks.gather({"rank": ranks.rank, "long": "x" * (1000 * ranks.rank)}),
        raise_on(ranks, 5, ValueError()),
        raise_on(ranks, 1, ValueError(f"of {ranks.rank}")),
        raise_on(ranks, 1, UnsendableError("cannot", "send")),
        ranks.on_rank_0(lambda: "first"),
    )


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("world", [2, 3])
def test_gather_and_agree(groups: Groups, world: int, kind: str) -> None:
    for rank, found in enumerate(groups(world).run(all_of_it, kind)):
        assert found[0] == [{"rank": r, "long": "x" * (1000 * r)} for r in range(world)]
        assert found[1:3] == ("fine", "ValueError: of 1")
        own = "UnsendableError: cannot send"
        assert found[3] == (own if rank == 1 else f"RuntimeError: rank 1 raised {__name__}.{own}")
        assert found[4] == ("first" if rank == 0 else None)


@pytest.mark.parametrize("kind", MAKES)
def test_alone(kind: str) -> None:
    ranks = MAKES[kind]()
    assert (ranks.rank, ranks.size, ranks.group) == (0, 1, None)
    assert ranks.gather(3) == gather(3) == [3]
    assert ranks.agree(lambda: 4) == agree(lambda: 4) == 4
    assert ranks.on_rank_0(lambda: 5) == on_rank_0(lambda: 5) == 5


def there_and_back() -> tuple[list[int], int]:
    ranks = PrivateRanks.make()
    sent = ranks.to_rank_0(10 * ranks.rank)
    return sent, ranks.from_rank_0([value + 1 for value in sent])


def test_rank_0_gives_and_takes(groups: Groups) -> None:
    assert groups(3).run(there_and_back) == [([0, 10, 20], 1), ([], 11), ([], 21)]
    assert there_and_back() == ([0], 1)


def go_on_without_a_process_group() -> tuple[list[int], list[int]]:
    """The process group is destroyed while a thread waits for the other ranks."""
    private, current = PrivateRanks.make(), Ranks.current()
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(private.gather(private.rank)))
    if private.rank == 0:
        thread.start()
    dist.destroy_process_group()
    if private.rank != 0:
        thread.start()
    thread.join()
    assert rank_and_world() == (0, 1)
    return found[0], current.gather(10 * current.rank)


def test_destroyed_process_group() -> None:
    group = Group(2)
    try:
        assert group.run(go_on_without_a_process_group) == [([0, 1], [0, 10])] * 2
    finally:
        group.close()


def leave_halfway() -> str:
    """Rank 1 does not answer in task 1, and then begins task 2."""
    ranks = PrivateRanks.make()
    ranks = replace(ranks, task=1 if ranks.rank == 0 else 2)
    if ranks.rank == 1:
        ranks.to_rank_0("of task 2")
        return ""
    with pytest.raises(RuntimeError) as error:
        ranks.to_rank_0("of task 1")
    return str(error.value)


def test_rank_that_left_a_task(groups: Groups) -> None:
    assert groups(2).run(leave_halfway)[0] == "rank 0 is at task 1, rank 1 at 2: one left it halfway"
