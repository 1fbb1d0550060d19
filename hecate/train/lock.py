"""One run folder, one trainer: a lock of the kernel's on a file in it, which also says who holds the lock.

The kernel drops the lock when its holder ends, however that ends, so a lock that is held is never taken from anybody.
Every rank holds a share: ranks that outlive rank 0 by a few seconds may still be writing a checkpoint.

A lock that nobody holds may still have a holder in its file: one that was killed, or, if locks do not reach from one
host to another on that file system, one that is at work elsewhere. `Holder.gone` and `locks_reach_all_hosts` tell them
apart; if neither can, the user has to. A file system without locks has the holder in the file only.
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
"""Seconds for what another process does at once: looking at the file, or writing itself into it."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What flock() says on a file system without locks."""
OF_ONE_HOST = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
)


class FolderInUseError(RuntimeError):
    """Another trainer is at work in the run's folder, or may be; nothing was changed."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, or did.

    Attributes:
        host: its name.
        pid: of rank 0.
        started: when that process did, in clock ticks after the host did; process ids are used again.
        launches: names of what started it, see `signals.launches`.
    """

    host: str
    pid: int
    started: int | None
    launches: tuple[str, ...]

    @classmethod
    def this_process(cls, launches: Mapping[str, bool]) -> Holder:
        """It."""
        return cls(socket.gethostname(), os.getpid(), start_of(os.getpid()), tuple(sorted(launches)))

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """What `text` says; None if it is empty, as after a trainer that has ended by itself."""
        if not text.strip():
            return None
        try:
            found = json.loads(text.partition("\n")[0])  # what follows is of a longer one before
            return cls(str(found["host"]), int(found["pid"]), found["started"], tuple(found["launches"]))
        except (ValueError, KeyError, TypeError):  # cut off by a crash of the machine
            return cls("unknown", 0, None, ())

    def gone(self, launches: Mapping[str, bool]) -> bool:
        """Whether it has certainly ended: nobody has its process id now, or its launch was restarted, as this process.

        torchrun restarts, and SLURM requeues, when all processes of the attempt before are gone.
        """
        if self.host == socket.gethostname():
            return start_of(self.pid) is None or start_of(self.pid) != self.started
        return any(again and name in self.launches for name, again in launches.items())

    def __str__(self) -> str:
        jobs = "".join(f", job {name}" for name in self.launches if not name.startswith("torchrun"))
        return f"host {self.host}, process {self.pid}{jobs}"


class RunLock:
    """The lock of one folder: rank 0 calls `take`, then the others `join`, and all `release`.

    Args:
        folder: of the run.
        launches: see `signals.launches`.
        patience: seconds to wait for the last processes of a trainer whose rank 0 has ended.
    """

    def __init__(self, folder: Path, launches: Mapping[str, bool], patience: float) -> None:
        self._path, self._launches, self._patience = folder / LOCK, launches, patience
        self._file: int | None = None
        self._owner = False
        self._locks = True  # whether the file system has any

    def take(self) -> None:
        """Make the folder, if there is none, and take the lock.

        Raises:
            FolderInUseError: somebody else has it.
            OSError: the folder cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        begin, waiting = time.monotonic(), False
        while not self._lock(fcntl.LOCK_EX, create=True):
            holder = self._holder()
            gone = holder is not None and holder.gone(self._launches)
            # Somebody may just be taking over.
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
        """Hold a share; a rank to which the folder is not visible has nothing to guard there."""
        end = time.monotonic() + MOMENT
        while self._path.exists() and not self._lock(fcntl.LOCK_SH, create=False):
            if time.monotonic() > end:
                raise FolderInUseError(f"{self._path}: rank 0's lock was taken by another trainer")
            time.sleep(POLL_SECONDS)

    def release(self, leave_holder: bool) -> None:
        """Give it back.

        Args:
            leave_holder: the file stays, with the holder in it; for a trainer that failed, whose other ranks may not
                have ended yet.
        """
        if self._owner and not leave_holder:
            self._path.unlink(missing_ok=True)
        self._close()

    def _lock(self, kind: int, create: bool) -> bool:
        """Whether the file at the path could be opened and locked, at once."""
        self._file = os.open(self._path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        # The holder may have removed the file in between: then this is the lock of nothing.
        if self._flock(kind) and _is_at(self._file, self._path):
            return True
        self._close()
        return False

    def _flock(self, kind: int) -> bool:
        """Whether the lock could be had at once; True, too, if there are no locks."""
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
        """With the lock alone: check who had it, write this process down, and let the other ranks share."""
        assert self._file is not None
        before = Holder.parse(_read(self._file))
        if before is not None and not before.gone(self._launches):
            if before.host == socket.gethostname():  # it shares the lock in just this moment, or there are no locks
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
        """Let the other ranks in. The kernel drops the old lock first; who comes between finds this process written."""
        end = time.monotonic() + MOMENT
        while not self._flock(fcntl.LOCK_SH):
            if time.monotonic() > end:
                raise FolderInUseError(self._refusal(None))
            time.sleep(POLL_SECONDS)
        self._owner = True

    def _holder(self) -> Holder | None:
        """Who has the lock; None if it was given back meanwhile, or who has it has not yet said so."""
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
    """The lock of `folder`, for as long as the block runs; see `RunLock`. Collective.

    Raises:
        FolderInUseError: another trainer has it; on all ranks.
        OSError: the folder cannot be written; on all ranks.
    """
    lock, first = RunLock(folder, launches, patience), rank_and_world()[0] == 0
    failed = True
    try:
        agree(lambda: lock.take() if first else None)
        agree(lambda: None if first else lock.join())
        yield
        failed = False
    except SystemExit:  # asked to stop, and saved
        failed = False
        raise
    finally:
        lock.release(leave_holder=failed)


def start_of(pid: int) -> int | None:
    """When a process of this host started, in clock ticks after the host did; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before may have blanks and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def locks_reach_all_hosts(path: Path) -> bool:
    """Whether a lock on `path` that is held anywhere is seen here: its disk is this host's alone, or is known to tell.

    NFS and Lustre can be mounted with locks that the other hosts do not see.
    """
    kind, options = _mount_of(path)
    if kind.startswith("nfs"):
        return "local_lock=none" in options and "nolock" not in options
    if kind == "lustre":
        return "flock" in options
    return kind in OF_ONE_HOST or kind in ("ceph", "gpfs")


def _mount_of(path: Path) -> tuple[str, frozenset[str]]:
    """Kind and options of the file system of `path`; an empty kind if the kernel does not say."""
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
