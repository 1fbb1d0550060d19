"""An error on one rank becomes an error on all, instead of a hang of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hecate.ranks.raised import Raised

__all__ = ["agree", "gather", "on_rank_0", "rank_and_world"]

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Of the default process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank passes, by rank. Collective over `group` of all ranks (None: the default one)."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=group)
    return values


def agree(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`function()`; if it raises on any rank, all raise what the lowest such rank did. Collective.

    On that rank it is the exception itself; elsewhere one of the same class and text, or a RuntimeError that names the
    rank, class and text if the exception cannot be pickled.
    """
    error: Exception | None = None
    try:
        value = function()
    except Exception as raised:
        error = raised
    for rank, raised_there in enumerate(gather(None if error is None else Raised.of(error), group)):
        if raised_there is not None:
            own = rank == (dist.get_rank(group) if dist.is_initialized() else 0)
            raise error if own and error is not None else raised_there.rebuilt(rank, also=error)
    return value


def on_rank_0(function: Callable[[], Any]) -> Any:
    """`function()` there, None elsewhere."""
    return function() if rank_and_world()[0] == 0 else None
