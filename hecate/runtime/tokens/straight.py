"""What all kinds of dispatch know that send each row directly to the device that computes it.

Shapes: T tokens of this device, k experts per token, N rows sent, M rows received.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hecate.ops.permute import block_order, invert
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.exchange import Dispatch

__all__ = ["Straight"]


@dataclass(frozen=True, eq=False)
class Straight(Dispatch):
    """Sends each row directly to the device that computes it.

    Attributes:
        order: int64 `[N]`, the copies of tokens (`t * k + j`) sorted by (destination, expert).
        sent, received: number of rows to and from each device.
        blocks: int64 `[2, B]`, how received rows are sorted by (row of the expert here, source), see `block_order`;
            None if they arrive in that order, for example because one expert is held here.
        sizes: received rows per expert held here, in the order of the experts' rows.
        top_k: experts per token.
        comms: process groups of the devices that share the experts.
    """

    order: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    blocks: Tensor | None
    sizes: tuple[int, ...]
    top_k: int
    comms: Comms

    @cached_property
    def local_order(self) -> Tensor | None:
        """int64 `[M]`, permutation that sorts received rows by (row of the expert here, source); None: sorted."""
        return None if self.blocks is None else block_order(self.blocks, sum(self.received))

    @cached_property
    def local_inverse(self) -> Tensor | None:
        """The inverse of `local_order`."""
        return None if self.local_order is None else invert(self.local_order)
