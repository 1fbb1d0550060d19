"""At most one trainer per run folder: an flock() lock on a file in the folder, which also records the holder.

The kernel releases the lock when its holder ends for any reason, so a held lock is never taken over. Every rank holds
the lock (shared), because ranks that outlive rank 0 by a few seconds may still be writing a checkpoint.

An unlocked file may still record a holder: either that trainer was killed, or it is running on another host and the
file system does not propagate locks between hosts. `Holder.gone` and `locks_reach_all_hosts` tell the two cases apart;
if they cannot, the user has to decide. On a file system without locks only the recorded holder protects the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hecate.ranks.agree import agree, rank_and_world

__all__ = ["LOCK", "FolderInUseError", "Holder", "RunLock", "locked", "locks_reach_all_hosts"]

LOCK = "lock"
MOUNTS = Path("/proc/self/mountinfo")
POLL_SECONDS = 0.02
MOMENT = 5.0
"""Seconds to wait for short operations of another process, such as reading the file or recording its holder."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Error numbers of flock() on a file system without locks."""
OF_ONE_HOST = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
)


class FolderInUseError(RuntimeError):
    """Another trainer is, or may be, using the run's folder; nothing was changed."""


@dataclass(frozen=True)
class Holder:
    """The present or former holder of a lock.

    Attributes:
        host: host name of rank 0.
        pid: process id of rank 0.
        started: start time of that process in clock ticks since boot, because process ids are reused.
        launches: names of the launches that started it, see `signals.launches`.
    """

    host: str
    pid: int
    started: int | None
    launches: tuple[str, ...]

    @classmethod
    def this_process(cls, launches: Mapping[str, bool]) -> Holder:
        """The holder that stands for this process."""
        return cls(socket.gethostname(), os.getpid(), start_of(os.getpid()), tuple(sorted(launches)))

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """The holder recorded in `text`; None if the text is empty."""
        if not text.strip():
            return None
        try:
            found = json.loads(text.partition("\n")[0])  # the rest may be left from a longer record
            return cls(str(found["host"]), int(found["pid"]), found["started"], tuple(found["launches"]))
        except (ValueError, KeyError, TypeError):  # truncated by a crash of the machine
            return cls("unknown", 0, None, ())

    def gone(self, launches: Mapping[str, bool]) -> bool:
        """Whether the holder has certainly ended.

        On this host: its process no longer exists. On another host: this process is a restart of the same launch;
        torchrun restarts and SLURM requeues only after all processes of the previous attempt have ended.
        """
        if self.host == socket.gethostname():
            return start_of(self.pid) is None or start_of(self.pid) != self.started
        return any(again and name in self.launches for name, again in launches.items())

    def __str__(self) -> str:
        jobs = "".join(f", job {name}" for name in self.launches if not name.startswith("torchrun"))
        return f"host {self.host}, process {self.pid}{jobs}"


class RunLock:
    """The lock of one folder: rank 0 calls `take`, then the other ranks `join`, and at the end all call `release`.

    Args:
        folder: folder of the run.
        launches: see `signals.launches`.
        patience: seconds to wait for the remaining processes of a trainer whose rank 0 has ended.
    """

    def __init__(self, folder: Path, launches: Mapping[str, bool], patience: float) -> None:
        self._path, self._launches, self._patience = folder / LOCK, launches, patience
        self._file: int | None = None
        self._owner = False
        self._locks = True  # whether the file system supports locks

    def take(self) -> None:
        """Take the lock; makes the folder if it does not exist.

        Raises:
            FolderInUseError: another trainer holds the lock.
            OSError: the folder cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        begin, waiting = time.monotonic(), False
        while not self._lock(fcntl.LOCK_EX, create=True):
            holder = self._holder()
            gone = holder is not None and holder.gone(self._launches)
            # Without a recorded holder, another trainer may be about to record itself.
            limit = max(self._patience, MOMENT) if gone else MOMENT if holder is None else 0
            if time.monotonic() - begin > limit:
                raise FolderInUseError(self._refusal(holder))
            if gone and not waiting and time.monotonic() - begin > MOMENT / 10:
                waiting = True
                _say(f"{self._path}: waiting for the last processes of a trainer that has ended ({holder})")
            time.sleep(POLL_SECONDS)
        try:
            self._become_holder()
        except BaseException:
            self._close()
            raise

    def join(self) -> None:
        """Take the lock as shared. A rank that does not see the folder does nothing, since it cannot write there."""
        end = time.monotonic() + MOMENT
        while self._path.exists() and not self._lock(fcntl.LOCK_SH, create=False):
            if time.monotonic() > end:
                raise FolderInUseError(f"{self._path}: rank 0's lock was taken by another trainer")
            time.sleep(POLL_SECONDS)

    def release(self, leave_holder: bool) -> None:
        """Release the lock.

        Args:
            leave_holder: keep the file with the recorded holder; for a trainer that failed, whose other ranks may
                still be running.
        """
        if self._owner and not leave_holder:
            self._path.unlink(missing_ok=True)
        self._close()

    def _lock(self, kind: int, create: bool) -> bool:
        """Open the file and try to lock it without waiting; whether that succeeded."""
        self._file = os.open(self._path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        # The holder may have removed the file after it was opened here; locking a removed file protects nothing.
        if self._flock(kind) and _is_at(self._file, self._path):
            return True
        self._close()
        return False

    def _flock(self, kind: int) -> bool:
        """Try to lock without waiting; whether that succeeded. True if the file system has no locks."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._locks = False
        return True

    def _become_holder(self) -> None:
        """While holding the lock exclusively: check the recorded holder, record this process, then share the lock."""
        assert self._file is not None
        before = Holder.parse(_read(self._file))
        if before is not None and not before.gone(self._launches):
            if before.host == socket.gethostname():  # it is in `_share`, or there are no locks
                raise FolderInUseError(self._refusal(before))
            if not (self._locks and locks_reach_all_hosts(self._path)):
                raise FolderInUseError(self._refusal(before) + self._unknown())
        text = (json.dumps(asdict(Holder.this_process(self._launches))) + "\n").encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        os.fsync(self._file)
        self._share()
        if before is not None:
            _say(f"{self._path}: taken over from a trainer that ended without giving it back ({before})")
        if not self._locks:
            _say(f"{self._path}: this file system has no locks; trainers that start at the same moment are not noticed")

    def _share(self) -> None:
        """Convert the lock to shared, so that the other ranks can join.

        The kernel releases the exclusive lock first; a trainer that takes the lock in between finds this process
        recorded as the holder.
        """
        end = time.monotonic() + MOMENT
        while not self._flock(fcntl.LOCK_SH):
            if time.monotonic() > end:
                raise FolderInUseError(self._refusal(None))
            time.sleep(POLL_SECONDS)
        self._owner = True

    def _holder(self) -> Holder | None:
        """The recorded holder; None if the lock was released meanwhile or its holder is not recorded yet."""
        try:
            return Holder.parse(self._path.read_text(errors="replace"))
        except FileNotFoundError:
            return None

    def _refusal(self, holder: Holder | None) -> str:
        return (
            f"run folder {self._path.parent}: another trainer is at work in it ({holder or 'it has just started'}); "
            "stop that one or wait for its end, or give this run another name=. Nothing was changed"
        )

    def _unknown(self) -> str:
        return (
            f". If that one has ended without giving the folder back, delete {self._path}: its host is another one, "
            "and locks of this file system are not known to reach from host to host"
        )

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file, self._owner = None, False


@contextmanager
def locked(folder: Path, launches: Mapping[str, bool], patience: float) -> Iterator[None]:
    """Hold the lock of `folder` while the block runs; see `RunLock`. Collective.

    Raises:
        FolderInUseError: another trainer holds the lock; raised on all ranks.
        OSError: the folder cannot be written; raised on all ranks.
    """
    lock, first = RunLock(folder, launches, patience), rank_and_world()[0] == 0
    failed = True
    try:
        agree(lambda: lock.take() if first else None)
        agree(lambda: None if first else lock.join())
        yield
        failed = False
    except SystemExit:  # was asked to stop and has saved
        failed = False
        raise
    finally:
        lock.release(leave_holder=failed)


def start_of(pid: int) -> int | None:
    """Start time of a process of this host in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name may contain blanks and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def locks_reach_all_hosts(path: Path) -> bool:
    """Whether locks on `path` held on any host are certainly seen here.

    True if the file system is local to this host or is known to propagate locks. NFS and Lustre can be mounted such
    that other hosts do not see the locks.
    """
    kind, options = _mount_of(path)
    if kind.startswith("nfs"):
        return "local_lock=none" in options and "nolock" not in options
    if kind == "lustre":
        return "flock" in options
    return kind in OF_ONE_HOST or kind in ("ceph", "gpfs")


def _mount_of(path: Path) -> tuple[str, frozenset[str]]:
    """Type and mount options of the file system of `path`; an empty type if unknown."""
    real, longest, found = os.path.realpath(path), "", ("", frozenset[str]())
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])  # a blank is \040
        if len(point) >= len(longest) and os.path.commonpath([real, point]) == point:
            kind, _, options = after.split(" ", 2)
            longest, found = point, (kind, frozenset(f"{before.split()[5]},{options}".split(",")))
    return found


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
