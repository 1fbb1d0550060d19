"""Which expert goes from which device to which, for a pair of placements. Pure: no process group.

A reduction's moves are those of the gather, reversed: the device that sent a chunk gets the sum back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from hecate.placement import Placement

__all__ = ["Moves", "Transfer", "moves_between"]


@dataclass(frozen=True, order=True)
class Transfer:
    """The chunk of `expert` goes from device `src` to device `dst`."""

    expert: int
    src: int
    dst: int


@dataclass(frozen=True)
class Moves:
    """Transfers that turn placement `src` into placement `dst`; none depends on another.

    Attributes:
        src: the placement before.
        dst: the placement afterwards.
        transfers: ordered by expert, then by receiving device.
    """

    src: Placement
    dst: Placement
    transfers: tuple[Transfer, ...]

    @cached_property
    def reversed(self) -> Moves:
        """Every transfer backwards."""
        back = tuple(Transfer(t.expert, src=t.dst, dst=t.src) for t in self.transfers)
        return Moves(self.dst, self.src, back)


@lru_cache(maxsize=1024)
def moves_between(src: Placement, dst: Placement) -> Moves:
    """The moves of SparseAllGather (paper, section 3.1): each owner sends to each new holder.

    Args:
        src: exactly one device per expert.
        dst: any placement of the same shape.

    Raises:
        ValueError: an expert without exactly one owner, or placements of different shapes.
    """
    owners = src.owners
    new = zip(*map(list, (dst - src).matrix.nonzero()), strict=True)
    return Moves(src, dst, tuple(Transfer(expert, int(owners[expert]), device) for expert, device in new))
