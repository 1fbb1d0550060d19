"""The exchange of token rows between devices, and what every kind of dispatch offers.

Shapes: T tokens of this device, k experts a token, M rows received, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.runtime.comms import Comms

__all__ = ["AllToAll", "Dispatch"]


class Dispatch(ABC):
    """Where this device's rows go and how received rows lie: made once per layer and micro-batch, then only followed.

    Attributes:
        sizes: received rows per expert held here, in the order of its rows.
    """

    sizes: tuple[int, ...]

    @abstractmethod
    def dispatch(self, hidden: Tensor) -> Tensor:
        """Tokens `[T, d]` to the rows `[M, d]` that this device computes, sorted by its experts' rows. Collective."""

    @abstractmethod
    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Results `[M, d]` and weights `[T, k]` to the weighted sums `[T, d]` of this device's tokens. Collective."""


class AllToAll(torch.autograd.Function):
    """Rows to the devices they belong to; backward sends gradients the way back.

    Both come out in the dtype they went in with. Those that another device gets are rounded to `wire` on the way (None:
    not at all), those that stay are not.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], comms: Comms, wire: torch.dtype | None
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.comms, ctx.wire = sent, received, comms, wire
        return _all_to_all(rows, sent, received, comms, wire)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        with ctx.comms.guard():  # by `apply`, so that it can be differentiated again
            return AllToAll.apply(grad, ctx.received, ctx.sent, ctx.comms, ctx.wire), None, None, None, None


def _all_to_all(
    rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], comms: Comms, wire: torch.dtype | None
) -> Tensor:
    if comms.tokens is None:
        return rows.view_as(rows)
    packed = rows.to(wire or rows.dtype).contiguous()
    arrived = packed.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, packed, list(received), list(sent), group=comms.tokens)
    out = arrived.to(rows.dtype)
    if packed.dtype != rows.dtype:
        rank = comms.rank
        out.narrow(0, sum(received[:rank]), received[rank]).copy_(rows.narrow(0, sum(sent[:rank]), sent[rank]))
    return out
