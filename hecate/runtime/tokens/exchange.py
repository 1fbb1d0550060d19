"""The all-to-all of token rows between devices, and the interface of all kinds of dispatch.

Shapes: T tokens of this device, k experts per token, M rows received, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hecate.ops.permute import block_order
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms

__all__ = ["AllToAll", "Dispatch", "order_by_expert", "sorted_by_expert"]


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


def sorted_by_expert(index: Tensor, copies: int) -> Tensor:
    """Token copies sorted by expert, int64 `[copies]`, from the experts `[T, k]`; those without one (-1) are left out.

    Args:
        index: `[T, k]` expert of each token copy.
        copies: number of copies that have an expert; the host knows it from the counts.
    """
    return torch.argsort(index.flatten(), stable=True)[index.numel() - copies :]


def order_by_expert(
    plan: Plan, arriving: NDArray[np.int64], rank: int, local_rows: Sequence[int], device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """How received rows are sorted by (row of the expert here, sender), and how many there are per expert.

    Args:
        plan: who holds which expert.
        arriving: int64 `[D, P]`, rows from each sender for each (expert, device) pair of the plan.
        rank: this device.
        local_rows: experts held here, in the order of their rows.
        device: device of the result.

    Returns:
        int64 `[M]`, and the number of rows per expert held here, in the order of its rows.
    """
    expert, holder = plan.holders.T
    here = np.flatnonzero(holder == rank)
    rows = arriving[:, here]
    row_of = {e: i for i, e in enumerate(local_rows)}
    row = np.array([row_of[e] for e in expert[here].tolist()], dtype=np.int64)
    source = np.repeat(np.arange(len(rows)), len(here))
    order = block_order(rows.ravel(), np.lexsort((source, np.tile(row, len(rows)))), device)
    sizes = np.zeros(len(local_rows), dtype=np.int64)
    sizes[row] = rows.sum(axis=0)
    return order, tuple(sizes.tolist())
