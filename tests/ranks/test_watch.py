"""Ranks that die or hang are named while the others are blocked in a call that never raises, and those end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from hecate.errors import MissingRankError
from hecate.ranks.stuck import Inside
from hecate.ranks.watch import LOOKS, _Watcher
from tests.forked import Program


class Job:
    """A store in which a test lets ranks beat, and rank 0's watch over them."""

    def __init__(self, world_size: int) -> None:
        self.store, self.messages = dist.HashStore(), 0
        self.beating = set(range(1, world_size))
        for rank in range(world_size):
            self.store.add(f"{rank}/alive", 1)
        self.watcher = _Watcher(self, 0, world_size, 0.0)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method of the store; the watcher's calls are counted."""
        self.messages += 1
        return getattr(self.store, name)

    def beat(self) -> None:
        for rank in self.beating:
            self.store.add(str(rank), 1)

    def wait(self, seconds: float) -> bool:
        """The `wait` of the event that ends the watch."""
        self.beat()
        return False

    def is_set(self) -> bool:
        return False

    def leave(self, rank: int, why: str = "") -> None:
        self.beating -= {rank}
        if why:
            self.store.set(f"{rank}/why", why)
        self.store.add(f"{rank}/alive", -1)

    def look(self, times: int) -> MissingRankError | None:
        """What rank 0 knows after so many intervals."""
        for _ in range(times):
            self.beat()
            found = self.watcher.look(self)  # type: ignore[arg-type]
        return found


def test_ranks_that_stop_are_announced_together() -> None:
    job = Job(9)
    assert job.look(3 * LOOKS) is None
    job.beating -= {1, 2, 5}
    assert job.look(LOOKS - 1) is None
    found = job.look(2)
    assert found is not None
    assert found.ranks == [1, 2, 5]
    assert "ranks 1, 2, 5 are missing: no heartbeat for 0 s; it died or hangs" in str(found)


def test_who_beats_again_is_not_missing() -> None:
    job = Job(3)
    job.beating = {2}
    assert job.look(LOOKS + 1) is not None
    job.beating = {1, 2}
    assert job.look(3 * LOOKS) is None


def test_a_slow_rank_is_not_missing() -> None:
    job = Job(2)
    for _ in range(4):
        job.beating = set()
        assert job.look(LOOKS - 1) is None
        job.beating = {1}
        assert job.look(1) is None


def test_a_rank_that_left_in_good_order_is_not_missing_and_the_next_is_watched() -> None:
    job = Job(4)
    job.leave(1)
    assert job.look(3 * LOOKS) is None
    job.beating = {3}
    found = job.look(LOOKS + 1)
    assert found is not None
    assert found.ranks == [2]
    for rank in (1, 2, 3):
        alone = Job(4)
        for other in {1, 2, 3} - {rank}:
            alone.leave(other)
        assert alone.look(5 * LOOKS) is None
        alone.beating = set()
        found = alone.look(4 * LOOKS)
        assert found is not None
        assert found.ranks == [rank]


def test_a_rank_that_ended_by_an_exception_is_named_with_it() -> None:
    job = Job(3)
    job.leave(1, "ValueError: a|b")
    found = job.look(LOOKS + 1)
    assert str(found) == "rank 1 is missing: it ended, last uncaught exception: ValueError: a|b"
    consequence = Job(3)
    consequence.leave(1, "hecate.errors.MissingRankError: rank 2 is missing")
    assert consequence.look(2 * LOOKS) is None


def test_messages_per_look_do_not_depend_on_the_world_size() -> None:
    counts = []
    for world_size in (2, 1000):
        job = Job(world_size)
        job.messages = 0
        job.look(10)
        counts.append(job.messages)
    assert counts == [20, 20]


def looks(block: Callable[[threading.Event], object]) -> list[int]:
    """What another thread sees at LOOKS + 2 looks while this one, the main thread, runs `block` inside."""
    inside, end, seen = Inside(), threading.Event(), []

    def look() -> None:
        for _ in range(LOOKS + 2):
            time.sleep(0.02)
            seen.append(inside.look())
        end.set()

    thread = threading.Thread(target=look)
    with inside.entered(85), inside.entered(None):
        assert inside.exit_code == 85
        thread.start()
        block(end)
    thread.join(60)
    assert (inside.look(), inside.exit_code) == (0, None)
    return seen


def test_a_thread_that_waits_in_native_code_is_stuck() -> None:
    seen = looks(lambda end: end.wait(60))
    assert seen[-1] >= LOOKS - 1
    assert seen[2:] == list(range(seen[2], seen[2] + LOOKS))


def test_a_thread_that_polls_or_is_in_the_debugger_is_not_stuck() -> None:
    def poll(end: threading.Event) -> None:
        while not end.is_set():
            time.sleep(0.001)

    assert max(looks(poll)) < LOOKS // 2
    prompt: dict[str, Any] = {"__name__": "pdb"}
    exec("def wait(end): end.wait(60)", prompt)
    assert max(looks(prompt["wait"])) == 0


def test_a_backward_pass_in_another_thread_moves() -> None:
    inside, seen = Inside(), []

    def backward() -> None:
        for _ in range(LOOKS):
            with inside.entered(None):
                time.sleep(0.001)
            seen.append(inside.look())

    thread = threading.Thread(target=backward)
    with inside.entered(85):
        thread.start()
        thread.join(60)  # in native code
    assert len(seen) == LOOKS
    assert max(seen) == 0


RANK = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from hecate.ranks.heartbeat import Heartbeat

rank, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, is_master=False)
heart = Heartbeat(store, rank, 5, timedelta(seconds=0.25))
store.add("begun", 1)
store.wait(["all begun"])
if how == "leaves":
    sys.exit(0)
with heart.naming_missing_ranks(85):
    if how == "is stuck":
        time.sleep(600)
    while not store.check(["end"]):  # as if it compiled, or were in a debugger
        time.sleep(0.01)
"""


class FiveRanks:
    """Five processes, of which rank 2 is hit by a signal while ranks 0 and 4 are stuck; rank 3 leaves."""

    def __init__(self, sign: signal.Signals) -> None:
        self.sign, self.store = sign, dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        hows = ["is stuck", "runs", "is hit", "leaves", "is stuck"]
        self.ranks = [Program(("-c", RANK, str(rank), str(self.store.port), how)) for rank, how in enumerate(hows)]

    def hit(self) -> None:
        while self.store.add("begun", 0) < len(self.ranks):
            assert all(process.poll() is None for process in self.ranks)
            time.sleep(0.05)
        self.ranks[2].send_signal(self.sign)
        self.store.set("all begun", "")

    def check(self) -> None:
        ranks = self.ranks
        errors = {rank: ranks[rank].communicate(timeout=400)[1] for rank in (0, 4, 3)}
        assert ranks[1].poll() is None, "it was not stuck"
        self.store.set("end", "")
        errors[1] = ranks[1].communicate(timeout=60)[1]
        assert [ranks[rank].returncode for rank in (0, 1, 3, 4)] == [85, 0, 0, 85]
        missing = "rank 2 is missing: no heartbeat for 5 s; it died or hangs"
        for rank in (0, 4):
            assert f"rank {rank}: {missing}; stuck in <module>" in errors[rank]
            assert errors[rank].rstrip().endswith("exit 85")
        assert "rank 1: rank 2 is missing" in errors[1]
        assert "stuck" not in errors[1]
        assert errors[3] == ""

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()


def test_who_is_stuck_names_the_missing_rank_and_ends() -> None:
    jobs = [FiveRanks(sign) for sign in (signal.SIGKILL, signal.SIGSTOP)]  # both wait at the same time
    try:
        for job in jobs:
            job.hit()
        for job in jobs:
            job.check()
    finally:
        for job in jobs:
            job.kill()
