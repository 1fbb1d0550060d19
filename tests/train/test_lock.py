"""Only one trainer may use a run folder: tests taking the lock, refusal, and taking over a lock left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing as mp
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hecate.train import lock as module
from hecate.train.lock import LOCK, FolderInUseError, Holder, RunLock, locked, locks_reach_all_hosts, start_of
from tests.workers import Groups

FORK = mp.get_context("fork")  # fast, and these processes only need the lock
AGAIN = {"slurm 7": True}


def run_lock(folder: Path, launches: Mapping[str, bool] | None = None, patience: float = 0.0) -> RunLock:
    return RunLock(folder, launches or {}, patience)


@contextmanager
def process(function: Callable[..., None], *args: Any) -> Iterator[int]:
    """Start a process that calls `function` and then waits until the block ends; yields its id after the call."""
    ready = FORK.Event()

    def work() -> None:
        function(*args)
        ready.set()
        time.sleep(600)

    child = FORK.Process(target=work, daemon=True)
    child.start()
    try:
        assert ready.wait(60)
        assert child.pid is not None
        yield child.pid
    finally:
        child.kill()
        child.join()


def kill(pid: int) -> None:
    """Wait until its locks are gone."""
    os.kill(pid, signal.SIGKILL)
    while start_of(pid) is not None:
        time.sleep(0.01)


def take(folder: Path) -> None:
    run_lock(folder).take()


def join(folder: Path) -> None:
    run_lock(folder).join()


def leave(folder: Path, holder: Holder | str) -> None:
    """The files that a trainer left behind."""
    (folder / LOCK).write_text(holder if isinstance(holder, str) else json.dumps(asdict(holder)))


def test_lock_is_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    for _ in range(2):
        lock = run_lock(folder, {"slurm 7": False})
        lock.take()
        assert Holder.parse((folder / LOCK).read_text()) == Holder.this_process({"slurm 7": False})
        lock.release(leave_holder=False)
        assert list(folder.iterdir()) == []


def test_second_trainer_is_told_who_has_the_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine")
    lock = run_lock(tmp_path, {"slurm 7": False, "torchrun 9a": False})
    lock.take()
    before = (tmp_path / LOCK).read_text()
    who = f"host {socket.gethostname()}, process {os.getpid()}, job slurm 7"
    text = f"run folder {tmp_path}: another trainer is at work in it ({who}); stop that one or wait"
    for _ in range(2):
        with pytest.raises(FolderInUseError, match=re.escape(text)):
            run_lock(tmp_path, patience=600).take()
    assert (tmp_path / LOCK).read_text() == before
    lock.release(leave_holder=False)
    run_lock(tmp_path).take()


def test_of_trainers_that_start_together_one_gets_it(tmp_path: Path) -> None:
    count = 6
    start, results, end = FORK.Barrier(count), FORK.SimpleQueue(), FORK.Event()

    def contend(folder: Path) -> None:
        start.wait()
        try:
            run_lock(folder).take()
        except FolderInUseError as error:
            results.put((os.getpid(), str(error)))
        else:
            results.put((os.getpid(), None))
        end.wait(60)

    for round_ in range(5):
        if round_ % 2:  # also when there is something to take over
            leave(tmp_path, replace(Holder.this_process({}), started=0))
        children = [FORK.Process(target=contend, args=(tmp_path,), daemon=True) for _ in range(count)]
        for child in children:
            child.start()
        found = [results.get() for _ in range(count)]
        winners = [pid for pid, error in found if error is None]
        end.set()
        for child in children:
            child.join()
        end.clear()
        assert len(winners) == 1
        assert all(f"process {winners[0]})" in error for _, error in found if error is not None)


def test_lock_of_a_killed_trainer_is_taken_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with process(take, tmp_path) as pid:
        with pytest.raises(FolderInUseError):
            run_lock(tmp_path).take()
        kill(pid)
        run_lock(tmp_path).take()
    said = capfd.readouterr().err.splitlines()
    who = f"host {socket.gethostname()}, process {pid}"
    assert said == [f"{tmp_path / LOCK}: taken over from a trainer that ended without giving it back ({who})"]


def test_rank_that_outlives_rank_0_keeps_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOMENT", 0.1)
    said: list[str] = []
    with process(take, tmp_path) as first, process(join, tmp_path) as other:

        def say(text: str) -> None:
            said.append(text)
            if "waiting for the last processes of a trainer that has ended" in text:
                kill(other)

        kill(first)
        with pytest.raises(FolderInUseError, match=f"process {first}"):
            run_lock(tmp_path, patience=0.1).take()
        monkeypatch.setattr(module, "_say", say)
        run_lock(tmp_path, patience=60).take()
    assert ["waiting" in text for text in said] == [True, False], said  # then it is taken over


OWN = Holder.this_process({})
ELSEWHERE = replace(OWN, host="elsewhere", launches=("slurm 7", "torchrun 9a"))


@pytest.mark.parametrize(
    ("left", "launches", "reach", "taken"),
    [
        (replace(OWN, pid=2**30), {}, False, True),  # gone
        (replace(OWN, started=1), {}, False, True),  # another process has its id
        (OWN, {}, True, False),
        (ELSEWHERE, {}, True, True),  # its lock would be seen
        (ELSEWHERE, {}, False, False),
        (ELSEWHERE, {"slurm 7": True}, False, True),  # requeued
        (ELSEWHERE, {"slurm 7": False}, False, False),  # the same job twice
        (ELSEWHERE, {"slurm 8": True}, False, False),
        (ELSEWHERE, {"torchrun 9a": True}, False, True),
        ('{"host": "cut o', {}, True, True),
        ('{"host": "cut o', {}, False, False),
    ],
)
def test_what_nobody_holds_is_taken_over_if_its_trainer_has_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: Holder | str,
    launches: dict[str, bool],
    reach: bool,
    taken: bool,
) -> None:
    monkeypatch.setattr(module, "locks_reach_all_hosts", lambda path: reach)
    leave(tmp_path, left)
    before = (tmp_path / LOCK).read_text()
    lock = run_lock(tmp_path, launches)
    if taken:
        lock.take()
        assert Holder.parse((tmp_path / LOCK).read_text()) == Holder.this_process(launches)
        return
    with pytest.raises(FolderInUseError, match="another trainer is at work in it") as error:
        lock.take()
    assert (f"delete {tmp_path / LOCK}" in str(error.value)) == (left != OWN)
    assert (tmp_path / LOCK).read_text() == before
    (tmp_path / LOCK).unlink()
    run_lock(tmp_path).take()  # it has kept nothing


def test_held_lock_is_not_taken_from_a_requeued_job(tmp_path: Path) -> None:
    with process(lambda: run_lock(tmp_path, {"slurm 7": False}).take()), pytest.raises(FolderInUseError):
        run_lock(tmp_path, AGAIN).take()


def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run_lock(tmp_path).take()
    assert "this file system has no locks" in capfd.readouterr().err
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):
        run_lock(tmp_path).take()
    leave(tmp_path, ELSEWHERE)
    with pytest.raises(FolderInUseError, match="delete"):
        run_lock(tmp_path).take()
    run_lock(tmp_path, AGAIN).take()


@pytest.mark.parametrize(
    ("mount", "reach"),
    [
        ("rw - ext4 /dev/sda rw", True),
        ("rw - nfs4 host:/x rw,vers=4.2,local_lock=none", True),
        ("rw - nfs host:/x rw,vers=3,local_lock=flock", False),
        ("rw - nfs host:/x rw,vers=3,nolock,local_lock=none", False),
        ("rw - lustre a@o2ib:/x rw,flock,lazystatfs", True),
        ("rw - lustre a@o2ib:/x rw,localflock", False),
        ("rw shared:7 - fuse.sshfs host:/x rw", False),
    ],
)
def test_mounts_whose_locks_reach_all_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str, reach: bool
) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    escaped = str(folder).replace(" ", "\\040")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"1 0 8:1 / / rw - nfs root:/ rw\n2 1 0:9 / {escaped} {mount}\n3 1 0:9 / {escaped}2 rw - x y z\n")
    monkeypatch.setattr(module, "MOUNTS", mounts)
    assert locks_reach_all_hosts(folder) == reach
    monkeypatch.setattr(module, "MOUNTS", tmp_path / "none")
    assert not locks_reach_all_hosts(folder)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """The folder of a killed run, on a disk that became read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    leave(path, replace(OWN, started=1))
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_read_only_folder_is_named(read_only: Path) -> None:
    before = (read_only / LOCK).read_text()
    with pytest.raises(OSError, match=f"Read-only file system: '{read_only / LOCK}'"):
        run_lock(read_only).take()
    assert (read_only / LOCK).read_text() == before


def use(folder: str, error: str | None) -> list[str]:
    """What is in the folder while it is locked, and what was raised."""
    found: list[str] = []
    with suppress(ValueError, SystemExit), locked(Path(folder), {}, patience=0):
        found = sorted(path.name for path in Path(folder).iterdir())
        dist.barrier()  # rank 0 removes the file at the end; the other ranks look before
        if error == "ValueError":
            raise ValueError
        if error == "SystemExit":
            raise SystemExit(85)
    return found


def refused(folder: str) -> str:
    with pytest.raises(FolderInUseError) as error, locked(Path(folder), {}, patience=0):
        pass
    return str(error.value)


def test_all_ranks_are_refused_or_none(groups: Groups, tmp_path: Path) -> None:
    mine = run_lock(tmp_path)
    mine.take()
    messages = groups(2).run(refused, str(tmp_path))
    assert messages[0] == messages[1]
    assert f"process {os.getpid()}" in messages[0]
    mine.release(leave_holder=False)
    for error in (None, "SystemExit"):
        assert groups(2).run(use, str(tmp_path), error) == [[LOCK], [LOCK]]
        assert list(tmp_path.iterdir()) == []
    # A run that failed leaves its name, for some of its ranks may not have ended.
    assert groups(2).run(use, str(tmp_path), "ValueError") == [[LOCK], [LOCK]]
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
