"""The checker of orders finds wrong orders that are made on purpose, and nothing in right ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.dry_run.order import faults_in_order
from tests.dry_run.records import Launch, Message


def reduce(group: str = "a", num_bytes: int = 8, members: tuple[int, ...] = (0, 1)) -> Launch:
    return Launch(group, members, "allreduce_", num_bytes)


def exchange(sent: tuple[int, ...], received: tuple[int, ...], group: str = "tokens") -> Launch:
    return Launch(group, (0, 1), "alltoall_base_", 0, sent, received)


def messages(*parts: tuple[str, int, int], group: str = "experts") -> Launch:
    """Parts are ("to" or "from", peer, bytes)."""
    return Launch(group, (0, 1, 2), "messages", messages=tuple(Message(d == "to", p, n) for d, p, n in parts))


def test_right_orders_pass() -> None:
    ring = {r: messages(("to", (r + 1) % 3, 4), ("from", (r - 1) % 3, 4)) for r in range(3)}
    logs = {
        0: [reduce(), exchange((2, 5), (2, 7)), ring[0], reduce("b")],
        1: [reduce(), exchange((7, 1), (5, 1)), ring[1], reduce("b")],
        2: [ring[2]],
    }
    assert faults_in_order(logs) == []


WRONG = {
    "another order in a group": (
        {0: [reduce(num_bytes=8), reduce(num_bytes=16)], 1: [reduce(num_bytes=16), reduce(num_bytes=8)]},
        "group a, collective 0: rank 0 calls allreduce_ of 8 bytes",
    ),
    "a collective too few": ({0: [reduce(), reduce()], 1: [reduce()]}, "collective 1: rank 0 calls allreduce_"),
    "a member that calls nothing": ({0: [reduce()], 1: []}, "rank 1 nothing"),
    "splits that differ": (
        {0: [exchange((2, 5), (2, 7))], 1: [exchange((7, 1), (4, 1))]},
        "rank 0 sends 5 bytes to rank 1, which expects 4",
    ),
    "a send without a receive": ({0: [messages(("to", 1, 4))], 1: []}, "from rank 0 to rank 1: no receive"),
    "a receive without a send": ({0: [], 1: [messages(("from", 0, 4))]}, "from rank 0 to rank 1: no send"),
    "a message of another size": (
        {0: [messages(("to", 1, 4))], 1: [messages(("from", 0, 8))]},
        "4 bytes are sent (), 8 expected ()",
    ),
    "another order across groups": (
        {0: [reduce("a"), reduce("b")], 1: [reduce("b"), reduce("a")]},
        "a circle of waits: ",
    ),
    "messages before a collective, and after it": (
        {0: [messages(("to", 1, 4)), reduce()], 1: [reduce(), messages(("from", 0, 4))]},
        "a circle of waits: ",
    ),
    "two ranks that both send first": (
        {r: [messages(("to", 1 - r, 4)), messages(("from", 1 - r, 4))] for r in range(2)},
        "a circle of waits: ",
    ),
    "a circle over three groups": (
        {
            0: [reduce("a", members=(0, 1)), reduce("c", members=(0, 2))],
            1: [reduce("b", members=(1, 2)), reduce("a", members=(0, 1))],
            2: [reduce("c", members=(0, 2)), reduce("b", members=(1, 2))],
        },
        "a circle of waits: ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_orders_are_named(name: str) -> None:
    logs, said = WRONG[name]
    faults = faults_in_order(logs)
    assert len(faults) == 1
    assert said in faults[0]


def test_a_circle_names_its_ranks_and_lines() -> None:
    first, second = (Launch(group, (0, 1), "allreduce_", 8, where=f"line of {group}") for group in "ab")
    (fault,) = faults_in_order({0: [first, second], 1: [second, first]})
    for rank in (0, 1):
        for group in "ab":
            assert f"rank {rank}: allreduce_ in group {group} (line of {group})" in fault


def test_ranks_that_were_not_run_are_left_out() -> None:
    logs = {0: [reduce(members=(0, 1)), messages(("to", 1, 4), ("to", 2, 4))], 2: [messages(("from", 0, 4))]}
    assert faults_in_order(logs) == []


def test_comparing_needs_no_torch() -> None:
    code = (
        "import sys, tests.dry_run.order, tests.dry_run.worker, tests.dry_run.cases; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
