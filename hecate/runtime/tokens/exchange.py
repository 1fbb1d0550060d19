"""The all-to-all of token rows between devices, and the interface of all kinds of dispatch.

Shapes: T tokens of this device, k experts per token, M rows received, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.runtime.comms import Comms

__all__ = ["AllToAll", "Dispatch"]


class Dispatch(ABC):
    """Where this device's rows go, and the order of received rows. Made once per layer and micro-batch.

    Attributes:
        sizes: received rows per expert held here, in the order of the experts' rows.
    """

    sizes: tuple[int, ...]

    @abstractmethod
    def dispatch(self, hidden: Tensor) -> Tensor:
        """Send tokens `[T, d]`; returns the rows `[M, d]` that this device computes, grouped by expert. Collective."""

    @abstractmethod
    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Send back results `[M, d]`; returns sums `[T, d]` per token, weighted by `weights` `[T, k]`. Collective."""


class AllToAll(torch.autograd.Function):
    """Sends rows to other devices; backward sends the rows' gradients back.

    Rows and gradients keep their dtype. Those sent to another device are rounded to `wire` on the way (None: not
    rounded); those that stay on their device are not.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], comms: Comms, wire: torch.dtype | None
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.comms, ctx.wire = sent, received, comms, wire
        return _all_to_all(rows, sent, received, comms, wire)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        with ctx.comms.guard():  # `apply`, so that the backward pass can be differentiated too
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
