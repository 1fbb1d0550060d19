"""Finds out what happened on any rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from hecate.ops.upload import upload
from hecate.ranks.messages import all_reduce

__all__ = ["anywhere"]


def anywhere(flags: Sequence[bool], groups: Sequence[dist.ProcessGroup], device: torch.device) -> list[bool]:
    """Which of the flags are set on any rank that is reached over `groups`, one group after the other. Collective.

    The host waits for the answer only on ranks where some flag is not set.

    Args:
        flags: of this rank; the same number on all ranks.
        groups: process groups.
        device: where the flags are reduced.
    """
    found = upload(torch.tensor(flags, dtype=torch.int32), device)
    for group in groups:
        all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return list(flags) if all(flags) else [bool(flag) for flag in found.tolist()]
