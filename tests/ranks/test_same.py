"""If values differ between ranks, the same error is raised on all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest import mock

import pytest
import torch.distributed as dist

from hecate.placement import Placement
from hecate.ranks.same import agree_on, check_equal, check_placements, check_same
from tests.workers import Groups


def message_of(call: Callable[[], None]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_names_the_value_that_differs_and_both_ranks() -> None:
    everyone = [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}]
    with pytest.raises(ValueError, match=r"^f: b is 2 on rank 0 and 3 on rank 2; all ranks must pass the same$"):
        check_equal("f", everyone)
    with pytest.raises(RuntimeError, match=r"^f: b is 2 on rank 0 and 3 on rank 2; all ranks must agree$"):
        check_equal("f", everyone, "agree", RuntimeError)
    check_equal("f", everyone[:2])


def test_a_value_that_a_rank_lacks_differs() -> None:
    for everyone, shown in (([{}, {"a": 1}], "None on rank 0 and 1"), ([{"a": 1}, {}], "1 on rank 0 and None")):
        with pytest.raises(ValueError, match=f"a is {shown} on rank 1"):
            check_equal("f", everyone)


def test_one_rank_is_equal_to_itself_without_a_process_group() -> None:
    check_same("f", {"a": 1})


def values_of(case: str) -> dict[str, object]:
    rank = dist.get_rank()
    if case == "raises on rank 1" and rank == 1:
        raise KeyError("b")
    if case == "raises on all":
        raise KeyError(rank)
    return {"a": 1, "b": rank if case == "differs" else 2}


def agree_on_values(case: str) -> list[str]:
    """Calls twice, to check that the first call leaves nothing behind."""
    return [message_of(lambda: agree_on("f", lambda: values_of(case), dist.group.WORLD)) for _ in range(2)]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("equal", "no error"),
        ("differs", "ValueError: f: b is 0 on rank 0 and 1 on rank 1; all ranks must pass the same"),
        ("raises on rank 1", "KeyError: 'b'"),
        ("raises on all", "KeyError: 0"),
    ],
)
def test_values_and_errors_are_agreed_on(groups: Groups, case: str, message: str) -> None:
    assert groups(3).run(agree_on_values, case) == [[message] * 2] * 3


def check_two_placements(debug: str) -> str:
    owners = [0, 1, dist.get_rank() % 2]
    placements = [Placement.from_owners([0], 3), Placement.from_owners(owners, 3)]
    with mock.patch.dict(os.environ, HECATE_DEBUG=debug):
        return message_of(lambda: check_placements("step 4", placements, dist.group.WORLD))


def test_placements_are_compared_under_debug_only(groups: Groups) -> None:
    messages = groups(3).run(check_two_placements, "1")
    assert len(set(messages)) == 1
    assert messages[0].startswith("RuntimeError: step 4: placement 1 is [3 experts on 3 devices, 3 holders, sha256 ")
    assert messages[0].endswith(" on rank 1; all ranks must make the same plan")
    assert groups(3).run(check_two_placements, "0") == ["no error"] * 3
