"""Do all ranks of a group hold the same value? Says which one differs, where a mismatch would hang."""

from __future__ import annotations

import hashlib
import os

import torch.distributed as dist
from torch import Tensor

from hecate.placement import Placement

__all__ = ["check_placements", "check_rows", "debugging", "differing_ranks"]


def debugging() -> bool:
    """HECATE_DEBUG=1: compare plans across ranks before following them. It changes no result."""
    return os.environ.get("HECATE_DEBUG", "0") == "1"


def differing_ranks(value: object, group: dist.ProcessGroup) -> list[int]:
    """Group ranks whose value is not what most ranks hold (the lowest rank's where none leads). Collective."""
    values: list[object] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    most = max(values, key=values.count)
    return [rank for rank, other in enumerate(values) if other != most]


def check_placements(what: str, placements: tuple[Placement, ...], group: dist.ProcessGroup) -> None:
    """Under HECATE_DEBUG=1, RuntimeError naming the ranks that hold other placements than most. Collective."""
    if not debugging():
        return
    digest = hashlib.sha256(b"".join(repr(p).encode() + p.matrix.tobytes() for p in placements)).hexdigest()
    wrong = differing_ranks(digest, group)
    if wrong:
        raise RuntimeError(f"{what}: rank {', '.join(map(str, wrong))} has another placement than the other ranks")


def check_rows(what: str, rows: Tensor, group: dist.ProcessGroup) -> None:
    """Under HECATE_DEBUG=1, RuntimeError naming the ranks whose chunks have another shape or dtype. Collective."""
    if not debugging():
        return
    everyone: list[tuple[object, object]] = [(None, None)] * group.size()
    dist.all_gather_object(everyone, (tuple(rows.shape[1:]), rows.dtype), group=group)
    for name, values in zip(("chunk shape", "dtype"), zip(*everyone, strict=True), strict=True):
        most = max(values, key=values.count)
        for rank, value in enumerate(values):
            if value != most:
                raise RuntimeError(f"{what}: rank {rank} has another {name} {value} than the other ranks' {most}")
