"""Finds out whether this process is stuck: in a collective that never ends, rather than busy or in a debugger."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["Inside"]

_PENDING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _MainThread:
    """How often the main thread has answered `ask`."""

    answers = 0

    @staticmethod
    def ask() -> None:
        """Have the main thread answer when it executes Python the next time, which it does not in a native call.

        Its place in the program tells nothing: a thread that polls is nearly always seen in the same call, too.
        """
        ctypes.pythonapi.Py_AddPendingCall(_answer, None)


@_PENDING
def _answer(_: object) -> int:  # of the module, so that it outlives every pending call
    _MainThread.answers += 1
    return 0


class Inside:
    """Blocks in which the process may be stuck.

    It moves when the main thread executes Python, or any thread enters or leaves a block: with CUDA the backward pass
    runs in another thread, while the main thread waits for it in native code.

    Attributes:
        exit_code: exit code that a block was entered with; None outside of such a block.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._blocks = self._passages = 0
        self._seen = (-1, 0)
        self._still = 0  # looks since it moved

    @contextmanager
    def entered(self, exit_code: int | None) -> Iterator[None]:
        """The calling thread is inside. An inner block keeps the exit code of the outer one."""
        before = self.exit_code
        self.exit_code = before if exit_code is None else exit_code
        self._blocks += 1
        self._passages += 1
        try:
            yield
        finally:
            self.exit_code = before
            self._blocks -= 1
            self._passages += 1

    def look(self) -> int:
        """Returns for how many looks in a row the process has not moved inside a block."""
        seen = _MainThread.answers, self._passages
        still = seen == self._seen and self._blocks > 0 and not _at_prompt(_main_frame())
        self._still = self._still + 1 if still else 0
        if seen[0] != self._seen[0]:
            _MainThread.ask()
        self._seen = seen
        return self._still

    def where(self) -> str:
        """The place where the main thread is, as "function (file:line)"."""
        frame = _main_frame()
        if frame is None:
            return "a thread that has ended"
        return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _at_prompt(frame: FrameType | None) -> bool:
    """Whether the thread is in Python's debugger, which waits for its user."""
    while frame is not None:
        if frame.f_globals.get("__name__") in ("pdb", "bdb"):
            return True
        frame = frame.f_back
    return False
