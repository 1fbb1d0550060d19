"""Process groups that run functions of test modules on every rank."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import distributed_c10d

from tests.bench import DEFAULT, Bench, set_bench
from tests.forked import Program, free_port

TIMEOUT = timedelta(seconds=180)
PRELOADED = ["hecate", "transformers"]
"""Modules that one process imports once; the processes of all groups are forked from it."""


class WorkerError(AssertionError):
    """At least one rank raised; the message contains the traceback of every rank that did."""


class Group:
    """`world_size` processes in one group, one thread each.

    Args:
        world_size: the number of processes.
        timeout: of collectives.
        bench: device, backend and dtype.
        start: "spawn" for processes that use a GPU: CUDA cannot be used in a process that was forked from one that
            has asked for it, as a library may do when it is imported.
    """

    def __init__(
        self,
        world_size: int,
        timeout: timedelta = TIMEOUT,
        bench: Bench = DEFAULT,
        start: Literal["forkserver", "spawn"] = "forkserver",
    ) -> None:
        context = mp.get_context(start)
        if start == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.world_size = world_size
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            given = (rank, world_size, port, timeout, bench, theirs)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(*args)` on every rank; returns each rank's result. WorkerError if any rank raised."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [_receive(pipe) for pipe in self.pipes]
        failed = [f"--- rank {rank}\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            raise WorkerError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            process.kill()


class Groups:
    """Groups by world size, started on first use; a group that failed is replaced."""

    def __init__(self, bench: Bench = DEFAULT) -> None:
        self._bench = bench
        self._running: dict[int, Group] = {}

    def __call__(self, world_size: int) -> Groups._Guard:
        """Skips the test if this machine has not enough GPUs."""
        if reason := self._bench.lacks(world_size):
            pytest.skip(reason)
        if world_size not in self._running:
            self._running[world_size] = Group(world_size, bench=self._bench)
        return Groups._Guard(self, world_size)

    def discard(self, world_size: int) -> None:
        """End a group after an error, since ranks may be stuck; the next use starts a new one."""
        self._running.pop(world_size).close()

    def close(self) -> None:
        """End all."""
        for group in self._running.values():
            group.close()

    class _Guard:
        def __init__(self, groups: Groups, world_size: int) -> None:
            self._groups, self._world_size = groups, world_size

        def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
            """As `Group.run`."""
            try:
                return self._groups._running[self._world_size].run(function, *args)
            except WorkerError:
                self._groups.discard(self._world_size)
                raise


def start_scripts(world_size: int) -> tuple[list[Program], list[Connection]]:
    """The ranks of a group, which end as scripts do, and the pipes through which they are given functions to run."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/listener") as listener:
        words = ("-m", "tests.workers", str(listener.address))
        programs, pipes = [], []
        for rank in range(world_size):
            programs.append(Program(words, Path(__file__).parents[1]))
            pipes.append(listener.accept())
            pipes[rank].send((rank, world_size, port, TIMEOUT, DEFAULT))
    return programs, pipes


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "the process died"


def _serve(rank: int, world_size: int, port: int, timeout: timedelta, bench: Bench, pipe: Connection) -> None:
    torch.set_num_threads(1)
    set_bench(bench, rank)
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    # Its constructor waits for all ranks; a short timeout is meant for collectives, not for starting the processes.
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=max(timeout, TIMEOUT))
    dist.init_process_group(bench.backends, store=store, rank=rank, world_size=world_size, timeout=timeout)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        _destroy_subgroups()  # those of the previous function, which all ranks have finished
        gc.freeze()  # a collection that examines all imported modules takes a second on five ranks
        function, args = task
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _destroy_subgroups() -> None:
    """Every gloo group has a thread that wakes up a hundred times per second; a thousand of them overload a machine."""
    gc.collect()
    for group in list(distributed_c10d._world.pg_map):  # there is no public list
        if group is not dist.group.WORLD and not group.group_desc.startswith("mesh_"):  # DTensor keeps those by name
            dist.destroy_process_group(group)
    gc.collect()


def _script() -> None:
    """A rank of `start_scripts`."""
    with Client(sys.argv[1]) as pipe:
        _serve(*pipe.recv(), pipe)


if __name__ == "__main__":
    _script()
