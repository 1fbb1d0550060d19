"""The all-to-all of token rows between devices, and the interface of all kinds of dispatch.

Shapes: T tokens of this device, k experts per token, M rows received, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from hecate.ranks.messages import all_to_all
from hecate.runtime.comms import Comms

__all__ = ["AllToAll", "Dispatch", "Sending"]


class Dispatch(ABC):
    """Where this device's rows go, and the order of received rows. Made once per layer and micro-batch.

    Attributes:
        sizes: received rows per expert held here, in the order of the experts' rows; empty if `ends` says it.
        ends: int32 `[experts held here]`, exclusive ends of their rows, if only the device knows them; else None.
    """

    sizes: tuple[int, ...]
    ends: Tensor | None = None

    @abstractmethod
    def dispatch(
        self,
        hidden: Tensor,
        dtype: torch.dtype | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        beside: Callable[[], None] | None = None,
    ) -> Tensor:
        """Send tokens `[T, d]`; returns the rows `[M, d]` that this device computes, grouped by expert. Collective.

        Args:
            hidden: the tokens.
            dtype: dtype of the rows, in which the experts compute; None: that of the tokens. A dispatch by kernels was
                made for one dtype and takes no other.
            meanwhile: called in backward while the rows' gradients are on their way back.
            beside: called while the rows are on their way, with autograd; its backward runs while the rows' gradients
                are. A dispatch in several exchanges calls it before the first.
        """

    @abstractmethod
    def combine(self, rows: Tensor, weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Send back results `[M, d]`; returns sums `[T, d]` per token, weighted by `weights` `[T, k]`. Collective.

        Args:
            rows: the results.
            weights: the router's weights, zero where there is no expert.
            dtype: dtype of the sums; None: that of the results.
        """


class Sending:
    """Rows on their way between devices. Making one launches the exchange. Collective.

    Rows keep their dtype. Those sent to another device are rounded to `wire` on the way (None: not rounded); those that
    stay on their device are not.

    Args:
        rows: sorted by the device they go to.
        sent, received: number of rows to and from each device.
        comms: process groups of the devices that share the experts; without `tokens` the rows stay here.
        wire: dtype of rows between devices.
    """

    def __init__(
        self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], comms: Comms, wire: torch.dtype | None
    ) -> None:
        self._rows, self._sent, self._received, self._comms = rows, sent, received, comms
        self._packed = self._arrived = rows
        self._wait: Callable[[], object] | None = None
        if comms.tokens is not None:
            self._packed = rows.to(wire or rows.dtype).contiguous()
            self._arrived = self._packed.new_empty(sum(received), rows.shape[1])
            self._wait = all_to_all(self._arrived, self._packed, received, sent, comms.tokens, async_op=True)

    def wait(self) -> Tensor:
        """The rows that arrived, sorted by the device they come from. On CUDA the host does not wait."""
        if self._wait is None:
            return self._arrived
        with self._comms.guard():
            self._wait()
        out = self._arrived.to(self._rows.dtype)
        if self._packed.dtype != self._rows.dtype:
            rank, sent, received = self._comms.rank, self._sent, self._received
            own = self._rows.narrow(0, sum(sent[:rank]), sent[rank])
            out.narrow(0, sum(received[:rank]), received[rank]).copy_(own)
        return out


class AllToAll(torch.autograd.Function):
    """Sends rows to other devices; backward sends the rows' gradients back. See `Sending`."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], comms: Comms, wire: torch.dtype | None
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.comms, ctx.wire = sent, received, comms, wire
        arrived = Sending(rows, sent, received, comms, wire).wait()
        return arrived.view_as(rows) if arrived is rows else arrived

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        with ctx.comms.guard():  # `apply`, so that the backward pass can be differentiated too
            return AllToAll.apply(grad, ctx.received, ctx.sent, ctx.comms, ctx.wire), None, None, None, None
