"""A token's way to its experts and back: counts, permutation, all-to-all, and the mirror in backward.

Shapes: T tokens of this device, k experts a token, N = T * k rows sent, M rows received, d model width, D devices,
E experts, P (expert, device) pairs of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hecate.ops.permute import block_order, combine, invert, permute
from hecate.planning.plan import Plan
from hecate.runtime.copies import Comms
from hecate.runtime.finite import NonFiniteError

__all__ = ["AllToAll", "Dispatch", "Pass", "bring_back", "count_tokens", "dispatch_of", "send_out"]


@dataclass(frozen=True)
class Dispatch:
    """Where this device's rows go and how received rows lie; made once, used forward and backward.

    Attributes:
        order, inverse: int64 `[N]`, rows sorted by (destination, expert).
        sent, received: rows to and from each device.
        local_order, local_inverse: int64 `[M]`, received rows sorted by (row of the expert here, source).
        sizes: received rows per expert held here, in the order of its rows.
        top_k: experts a token.
        wire: dtype of rows between devices; None keeps theirs.
    """

    order: Tensor
    inverse: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    local_order: Tensor
    local_inverse: Tensor
    sizes: tuple[int, ...]
    top_k: int
    wire: torch.dtype | None


@dataclass(frozen=True)
class Pass:
    """Where a rank stands; all ranks of a group must stand in the same place.

    Attributes:
        layer: its name.
        number: of the layer.
        step: optimizer steps so far.
        with_grad: whether a backward pass may follow.
    """

    layer: str
    number: int
    step: int
    with_grad: bool

    @property
    def code(self) -> int:
        """All of it but the name, in 63 bits."""
        return (self.step << 16 | self.number) << 1 | self.with_grad


def count_tokens(where: Pass, index: Tensor, weights: Tensor, num_experts: int, comms: Comms) -> NDArray[np.int64]:
    """Exchange how many tokens each device routes to each expert.

    Args:
        where: this rank stands.
        index: `[T, k]` expert of each token copy.
        weights: `[T, k]`.
        num_experts: E.
        comms: the ranks that share the experts.

    Returns:
        int64 `[D, E]`, on the host: the one place of a layer where an accelerator is waited for.

    Raises:
        ValueError: on every rank, naming layer and rank, where an index is outside [0, E).
        NonFiniteError: likewise, where a weight is not finite; not with several replicas, as the others would wait for
            this one: there the loss and the gradients' norm become NaN, which all see.
        RuntimeError: likewise, where ranks stand in different forward passes or layers.
    """
    valid = (index >= 0) & (index < num_experts)
    slot = torch.where(valid, index, num_experts).flatten()
    row = torch.zeros(num_experts + 3, dtype=torch.int64, device=index.device)
    row[: num_experts + 1].scatter_add_(0, slot, torch.ones_like(slot))
    row[num_experts + 1] = (~torch.isfinite(weights.detach())).sum()
    row[num_experts + 2].fill_(where.code)
    table = row.new_empty(comms.topology.num_devices, row.numel())
    if comms.tokens is None:
        table[0] = row
    else:
        dist.all_gather(list(table.unbind(0)), row, group=comms.tokens)
    counts = table.cpu().numpy()
    _check_pass(where, counts[:, num_experts + 2])
    _check_range(where.layer, counts[:, num_experts], num_experts)
    if not comms.replicated:
        _check_finite(where.layer, counts[:, num_experts + 1])
    return counts[:, :num_experts]


def _check_pass(where: Pass, codes: NDArray[np.int64]) -> None:
    for rank, code in enumerate(codes.tolist()):
        if code != where.code:
            raise RuntimeError(
                f"{where.layer}: this rank runs {_said(where.code)}, rank {rank} {_said(code)}; all ranks must call "
                "the model equally often and in the same mode (generate() of unequal lengths needs synced_gpus=True)"
            )


def _said(code: int) -> str:
    kind = "with" if code & 1 else "without"
    return f"MoE layer {code >> 1 & 0xFFFF} {kind} gradients after {code >> 17} optimizer steps"


def _check_range(layer: str, outside: NDArray[np.int64], num_experts: int) -> None:
    for rank in np.flatnonzero(outside):
        raise ValueError(
            f"{layer}: the router of rank {rank} chose {outside[rank]} experts outside [0, {num_experts}); "
            f"the layer has {num_experts} experts"
        )


def _check_finite(layer: str, not_finite: NDArray[np.int64]) -> None:
    for rank in np.flatnonzero(not_finite):
        raise NonFiniteError(
            f"{layer}: the router of rank {rank} gave {not_finite[rank]} weights that are NaN or infinite"
        )


def dispatch_of(
    plan: Plan, index: Tensor, rank: int, local_rows: Sequence[int], wire: torch.dtype | None = None
) -> Dispatch:
    """The record that `plan` means for this device.

    Args:
        plan: whose quota row `rank` counts `index`.
        index: `[T, k]` expert of each token copy.
        rank: this device.
        local_rows: experts held here, in the order of their rows.
        wire: dtype of rows between devices, e.g. torch.bfloat16; None keeps theirs.
    """
    device = index.device
    num_devices = plan.quota.shape[0]
    expert, holder = plan.holders.T
    # Sorted by expert, a device's rows are consecutive blocks, one per pair; destinations put them in another order.
    by_expert = torch.argsort(index.flatten(), stable=True)
    to_pair = plan.quota[rank]
    order = by_expert[block_order(to_pair, np.lexsort((expert, holder)), device)]
    sent = np.bincount(holder, weights=to_pair, minlength=num_devices).astype(np.int64)

    here = np.flatnonzero(holder == rank)
    arriving = plan.quota[:, here]  # [D, experts held here, ascending]
    row_of = {e: i for i, e in enumerate(local_rows)}
    row = np.array([row_of[e] for e in expert[here].tolist()], dtype=np.int64)
    source = np.repeat(np.arange(num_devices), len(here))
    local_order = block_order(arriving.ravel(), np.lexsort((source, np.tile(row, num_devices))), device)
    sizes = np.zeros(len(local_rows), dtype=np.int64)
    sizes[row] = arriving.sum(axis=0)
    return Dispatch(
        order,
        invert(order),
        tuple(sent.tolist()),
        tuple(arriving.sum(axis=1).tolist()),
        local_order,
        invert(local_order),
        tuple(sizes.tolist()),
        index.shape[1],
        wire,
    )


def send_out(hidden: Tensor, record: Dispatch, comms: Comms) -> Tensor:
    """Tokens `[T, d]` to the rows `[M, d]` that this device computes, sorted by its experts' rows."""
    rows = permute(hidden, record.order, record.inverse, record.top_k)
    rows = AllToAll.apply(rows, record.sent, record.received, comms, record.wire)
    return permute(rows, record.local_order, record.local_inverse, 1)


def bring_back(rows: Tensor, weights: Tensor, record: Dispatch, comms: Comms) -> Tensor:
    """Results `[M, d]` to the weighted sums `[T, d]` of this device's tokens."""
    rows = permute(rows, record.local_inverse, record.local_order, 1)
    rows = AllToAll.apply(rows, record.received, record.sent, comms, record.wire)
    return combine(rows, weights, record.order, record.inverse)


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
        with ctx.comms.guard():
            return _all_to_all(grad, ctx.received, ctx.sent, ctx.comms, ctx.wire), None, None, None, None


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
