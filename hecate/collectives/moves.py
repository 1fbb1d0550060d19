"""From a pair of placements to frozen rounds of transfers: pure functions, no process group.

A schedule says who sends which expert to whom, and in which round. Transports only execute it. The reduction's schedule
is the gather's, reversed: whoever sent a chunk gets its sum back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from hecate.placement import Placement

__all__ = ["Schedule", "Transfer", "gather_schedule"]


@dataclass(frozen=True, order=True)
class Transfer:
    """One chunk on its way: `expert` from device `src` to device `dst`."""

    expert: int
    src: int
    dst: int


@dataclass(frozen=True)
class Schedule:
    """Transfers that turn placement `src` into placement `dst`.

    Attributes:
        src: who holds what before.
        dst: who holds what afterwards.
        rounds: transfers of one round are independent of each other; a round needs the rounds before it.
    """

    src: Placement
    dst: Placement
    rounds: tuple[tuple[Transfer, ...], ...]

    @cached_property
    def reversed(self) -> Schedule:
        """The mirror image: every transfer backwards, last round first."""
        back = tuple(
            tuple(Transfer(t.expert, src=t.dst, dst=t.src) for t in transfers) for transfers in self.rounds[::-1]
        )
        return Schedule(self.dst, self.src, back)

    @property
    def num_transfers(self) -> int:
        """Chunks that cross from one device to another."""
        return sum(map(len, self.rounds))


@lru_cache(maxsize=1024)
def gather_schedule(src: Placement, dst: Placement) -> Schedule:
    """Point-to-point schedule of SparseAllGather (paper, section 3.1): each owner sends to each new holder, one round.

    Args:
        src: exactly one device an expert.
        dst: any placement of the same shape.
    """
    new = (dst - src).matrix
    owners = src.owners
    transfers = tuple(
        Transfer(expert, int(owners[expert]), device) for expert, device in zip(*map(list, new.nonzero()), strict=True)
    )
    return Schedule(src, dst, (transfers,) if transfers else ())
