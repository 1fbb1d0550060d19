"""Closes threads and process groups when the object that uses them is closed or garbage collected."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Held", "close_abandoned"]


class Closable(Protocol):
    """Something that `Held` can close."""

    def close(self) -> None:
        """Release threads and process groups."""


class Held:
    """What an object holds until it is closed, at the latest when it is garbage collected.

    Args:
        owner: the object.
        parts: closed in this order. They must not refer to `owner`, also not through others: it would never be garbage.
    """

    def __init__(self, owner: object, *parts: Closable) -> None:
        self._parts = parts
        self._garbage = weakref.finalize(owner, _close_garbage, parts)
        self._garbage.atexit = False  # the interpreter has its own order of ending threads

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._garbage.alive

    def close(self) -> None:
        """Close everything; further calls do nothing."""
        if self._garbage.detach() is not None:
            _close(self._parts)


def close_abandoned() -> None:
    """Close what became garbage in a thread other than the main one."""
    while _abandoned:
        _close(_abandoned.popleft())


def _close(parts: Sequence[Closable]) -> None:
    for part in parts:
        part.close()


def _close_garbage(parts: Sequence[Closable]) -> None:
    """Garbage may be collected in a thread that a part has to end; then the next `close_abandoned` closes the parts."""
    if threading.current_thread() is threading.main_thread():
        _close(parts)
    else:
        _abandoned.append(parts)


_abandoned: deque[Sequence[Closable]] = deque()
