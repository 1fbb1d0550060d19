"""What all kinds of dispatch know that send each row directly to the device that computes it.

Shapes: T tokens of this device, k experts per token, N rows sent, M rows received.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hecate.ops.linear import linear
from hecate.ops.permute import block_order, invert
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.exchange import Dispatch

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Part", "Straight"]


class Part(NamedTuple):
    """A part of the rows that a dispatch packs; see the attributes of `Straight`, of which `order` is 0, 1, 2, ..."""

    order: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    blocks: Tensor | None
    sizes: tuple[int, ...]


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

    def combine(self, rows: Tensor, weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if self.comms.tokens is not None or self.blocks is not None:
            rows = linear(rows, self.come_home, self.leave)
        return self.add_up(rows, weights, dtype)

    # The parts of an exchange.

    @abstractmethod
    def pack(self, hidden: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The copies of tokens `[T, d]` in `order`, `[N, d]`; dtype None: that of the tokens."""

    @abstractmethod
    def add_up(self, rows: Tensor, weights: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Sums `[T, d]` per token of rows `[N, d]` in `order`, weighted by `weights` `[T, k]`; see `combine`."""

    @abstractmethod
    def leave(self, rows: Tensor) -> Callable[[], Tensor]:
        """From rows in `order` here to rows by expert on the experts' devices, without autograd. Collective.

        Launches an exchange and returns what waits for its rows.
        """

    @abstractmethod
    def come_home(self, rows: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Callable[[], Tensor]:
        """The reverse of `leave`. Collective."""

    @abstractmethod
    def with_order(self, order: Tensor) -> Self:
        """The same with the copies in another order."""

    @abstractmethod
    def of_packed(self, part: Part) -> Self:
        """The dispatch of a part of the rows, which are packed already: as tokens with one expert each."""
