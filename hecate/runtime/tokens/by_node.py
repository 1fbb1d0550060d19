"""Node-aware token exchange: a token is sent to each other node at most once, however many of its experts are there.

The token goes to a relay: the device that has the sender's index within its node. The relay forwards it to the experts'
devices and sums their results before they return. Results equal those of the plain exchange up to rounding, and the
order of every sum is fixed. How many rows go to each node follows from plan and counts, so that the host waits for
nothing: as many as the device has tokens, or copies for that node if those are fewer. Rows without a token are padding,
which the relay does not forward. With a wire dtype, rows are rounded whenever they leave a device; the relay sums in
float32 (or the compute dtype if that is wider) and rounds the sum once for the wire.

Shapes: T tokens of this device, k experts per token, n nodes, U rows sent to relays, R rows received as a relay, C
copies that the relay forwards, M rows computed here, d model width, D devices, P (expert, device) pairs of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate._native import arrival_table
from hecate.cost import LayerCost
from hecate.ops.permute import block_order, invert, sort_by_expert
from hecate.ops.upload import upload
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.exchange import AllToAll, Dispatch, Sending

__all__ = ["NodeDispatch", "node_dispatch", "node_exchange_pays"]


@dataclass(frozen=True)
class Leg:
    """One of the two exchanges: which source rows are sent, and how many go to each device.

    Attributes:
        index: int64 `[rows sent]`, the source row of each sent row; any row for padding.
        slots: int64 `[source rows, most copies of one row]`, positions of each source row among the sent rows, padded
            with `len(index)`.
        sent, received: number of rows to and from each device.
    """

    index: Tensor
    slots: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True)
class NodeDispatch(Dispatch):
    """Sends a row at most once to each other node: to the relay there, which forwards it.

    Attributes:
        across: exchange between nodes: from T tokens to the U rows sent to relays, sorted by (node, token), each node's
            padding last.
        here: bool `[U, k]`, which of the token's k copies are computed in that node.
        inside: exchange within the node: from R rows at the relay to C rows, sorted by (device, expert).
        local_order, local_inverse: int64 `[M]`, received rows sorted by (row of the expert here, relay); None: sorted.
        sizes: received rows per expert held here, in the order of the experts' rows.
        wire: dtype of rows between devices; None keeps theirs.
        comms: process groups of the devices that share the experts.
    """

    across: Leg
    here: Tensor
    inside: Leg
    local_order: Tensor | None
    local_inverse: Tensor | None
    sizes: tuple[int, ...]
    wire: torch.dtype | None
    comms: Comms

    def dispatch(
        self,
        hidden: Tensor,
        dtype: torch.dtype | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        beside: Callable[[], None] | None = None,
    ) -> Tensor:
        if beside is not None:
            beside()
        rows = _Take.apply(hidden.to(dtype or hidden.dtype), self.across.index, self.across.slots)
        rows = self._across(rows, back=False)
        rows = _Take.apply(rows, self.inside.index, self.inside.slots)
        rows = AllToAll.apply(rows, self.inside.sent, self.inside.received, self.comms, self.wire)
        return _sorted(rows, self.local_order, self.local_inverse)

    def combine(self, rows: Tensor, weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        across, inside = self.across, self.inside
        shares = _Take.apply(weights, across.index, across.slots) * self.here
        shares = AllToAll.apply(shares, across.sent, across.received, self.comms, None)
        if self.wire is not None:
            shares = shares.to(torch.promote_types(shares.dtype, torch.float32))  # dtype of the sums below
        copies = _sorted(rows, self.local_inverse, self.local_order)
        copies = AllToAll.apply(copies, inside.received, inside.sent, self.comms, self.wire)
        sums = _WeightedSum.apply(copies, shares, inside.index, inside.slots)
        sums = self._across(sums, back=True)
        return _SumOf.apply(sums, across.index, across.slots).to(rows.dtype).to(dtype or rows.dtype)

    def _across(self, rows: Tensor, back: bool) -> Tensor:
        leg = self.across
        sent, received = (leg.received, leg.sent) if back else (leg.sent, leg.received)
        return AllToAll.apply(rows, sent, received, self.comms, self.wire)


def node_exchange_pays(plan: Plan, cost: LayerCost, top_k: int) -> bool:
    """Whether the node-aware exchange is predicted to be faster. Integers only, so the answer is the same on all ranks.

    For a device that sends as many rows as the mean device, to all other nodes alike.
    """
    topology, model, size = plan.topology, cost.model, cost.token_bytes
    devices, others = topology.num_devices, topology.num_nodes - 1
    if not others:
        return False
    rows, inside = plan.rows
    foreign = (rows - inside) // devices
    together = min(rows // top_k // devices * others, foreign)
    messages = devices * model.message_ns
    plain_ns = 2 * (messages + foreign * size * 1_000_000_000 // model.inter_node_bandwidth)
    # The experts and weights of rows cross between nodes too; every copy is forwarded inside the node.
    extra = 8 * top_k
    across_ns = together * (2 * size + extra) * 1_000_000_000 // model.inter_node_bandwidth
    inside_ns = 2 * (rows // devices) * size * 1_000_000_000 // model.intra_node_bandwidth
    # Require that a third of the time is saved: packing at relays is not in the model.
    return 3 * (6 * messages + across_ns + inside_ns) < 2 * plain_ns


def node_dispatch(
    plan: Plan,
    index: Tensor,
    comms: Comms,
    local_rows: Sequence[int],
    wire: torch.dtype | None = None,
    by_expert: Tensor | None = None,
    tokens: NDArray[np.int64] | None = None,
) -> NodeDispatch:
    """Make this device's dispatch according to `plan`. Collective; the host does not wait for the device.

    Args:
        plan: made from the counts of `index`, so that this device's quota row adds up to them.
        index: `[T, k]` expert of each token copy; -1: none.
        comms: this device's process groups and topology.
        local_rows: experts held here, in the order of their rows.
        wire: dtype of rows between devices, e.g. torch.bfloat16; None keeps theirs.
        by_expert: `sort_by_expert(index)`, if that is there already.
        tokens: int64 `[D]`, tokens of each device; None: every copy on every device has an expert.
    """
    if tokens is None:
        tokens = plan.quota.sum(axis=1) // index.shape[1]
    order = sort_by_expert(index, len(plan.owners)) if by_expert is None else by_expert
    expert, holder = plan.holders.T
    rank_of_pair = np.empty(len(holder), dtype=np.int64)  # sorted by (device, expert)
    rank_of_pair[np.lexsort((expert, holder))] = np.arange(len(holder))
    node = holder // comms.topology.devices_per_node
    tables = upload(torch.from_numpy(np.stack([plan.quota[comms.rank], node, rank_of_pair])), index.device)
    pair_of = _pairs_of_copies(tables[0], int(plan.quota[comms.rank].sum()), order, index)
    sent, received = _rows_across(plan, tokens, comms)
    across, meant = _across_leg(pair_of, tables[1], sent, received, comms)
    at_relay = Sending(meant, sent, received, comms, None).wait()
    by_relay = plan.quota.reshape(comms.topology.num_nodes, -1, len(holder)).sum(axis=0)
    by_relay *= node == comms.topology.node_of(comms.rank)
    table, from_relays, sizes = arrival_table(plan.holders, by_relay, comms.rank, list(local_rows))
    inside = _inside_leg(at_relay, tables[2], holder, by_relay, from_relays, comms)
    blocks = upload(torch.from_numpy(table), index.device).view(2, -1)
    local_order = block_order(blocks, sum(sizes)) if len(table) else None
    inverse = None if local_order is None else invert(local_order)
    return NodeDispatch(across, meant >= 0, inside, local_order, inverse, sizes, wire, comms)


def _pairs_of_copies(quota: Tensor, copies: int, by_expert: Tensor, index: Tensor) -> Tensor:
    """The (expert, device) pair of each token copy, `[T, k]`; -1: the copy has no expert.

    If copies are sorted by expert, those of one pair are a consecutive block, whose length is the pair's quota.
    """
    pairs = torch.repeat_interleave(torch.arange(quota.numel(), device=index.device), quota, output_size=copies)
    pair_of = by_expert.new_full((index.numel(),), -1)
    return pair_of.scatter_(0, by_expert[index.numel() - copies :], pairs).view(index.shape)


def _rows_across(plan: Plan, tokens: NDArray[np.int64], comms: Comms) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Number of rows to and from each device in the exchange between nodes; `tokens` is int64 `[D]`.

    Rows to a node go to its relay: the device with this device's index within the node.
    """
    topology = comms.topology
    place, own = comms.rank % topology.devices_per_node, topology.node_of(comms.rank)
    peers = slice(place, None, topology.devices_per_node)  # with this device's index within their nodes
    node = plan.holders[:, 1] // topology.devices_per_node
    served = plan.quota[peers]
    to_node = np.bincount(node, weights=served[own], minlength=topology.num_nodes).astype(np.int64)
    sent, received = np.zeros((2, topology.num_devices), dtype=np.int64)
    sent[peers] = np.minimum(to_node, tokens[comms.rank])
    received[peers] = np.minimum(served[:, node == own].sum(axis=1), tokens[peers])
    return tuple(sent.tolist()), tuple(received.tolist())


def _across_leg(
    pair_of: Tensor, node_of_pair: Tensor, sent: tuple[int, ...], received: tuple[int, ...], comms: Comms
) -> tuple[Leg, Tensor]:
    """The exchange between nodes, and int32 `[U, k]`: the pairs that each row is meant for in its node; -1: none."""
    device, nodes, rows = pair_of.device, comms.topology.num_nodes, sum(sent)
    tokens, top_k = pair_of.shape
    node_of = torch.where(pair_of >= 0, node_of_pair[pair_of.clamp(min=0)], -1)
    copies = node_of == torch.arange(nodes, device=device).view(-1, 1, 1)  # [n, T, k]
    present = copies.any(2)
    place = comms.rank % comms.topology.devices_per_node
    per_node = np.array(sent[place :: comms.topology.devices_per_node], dtype=np.int64)
    start = upload(torch.from_numpy(np.cumsum(per_node) - per_node), device).view(-1, 1)
    slots = torch.where(present, start + present.cumsum(1) - 1, rows)  # [n, T]
    # Tokens that are absent from a node are written to a row behind the last, which is dropped.
    meant = torch.full((rows + 1, top_k), -1, dtype=torch.int32, device=device)
    meant[slots.flatten()] = torch.where(copies, pair_of, -1).to(torch.int32).flatten(0, 1)
    token = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    token[slots.flatten()] = torch.arange(tokens, device=device).repeat(nodes)
    return Leg(token[:rows], slots.t().contiguous(), sent, received), meant[:rows]


def _inside_leg(
    at_relay: Tensor,
    rank_of_pair: Tensor,
    holder: NDArray[np.int64],
    by_relay: NDArray[np.int64],
    from_relays: tuple[int, ...],
    comms: Comms,
) -> Leg:
    """The exchange within the node, as seen by a relay.

    Args:
        at_relay: int32 `[R, k]`, the (expert, device) pairs that each received row goes to; -1: none.
        rank_of_pair: int64 `[P]`, position of each pair sorted by (device, expert).
        holder: `[P]`, the device of each pair.
        by_relay: `[devices per node, P]`, rows that each relay of this node sends to each pair.
        from_relays: rows that each relay sends to this device.
        comms: process groups and topology.
    """
    topology = comms.topology
    to_pair = by_relay[comms.rank % topology.devices_per_node]
    copies = int(to_pair.sum())
    flat = at_relay.flatten()
    key = torch.where(flat >= 0, rank_of_pair[flat.clamp(min=0)], len(holder))
    taken = sort_by_expert(key, len(holder) + 1)[:copies]
    slots = torch.full_like(key, copies)
    slots[taken] = torch.arange(copies, device=key.device)
    sent = np.bincount(holder, weights=to_pair, minlength=topology.num_devices).astype(np.int64)
    received = np.zeros_like(sent)
    first = topology.node_of(comms.rank) * topology.devices_per_node
    received[first : first + topology.devices_per_node] = from_relays
    index = taken // at_relay.shape[1]
    return Leg(index, slots.view_as(at_relay), tuple(sent.tolist()), tuple(received.tolist()))


def _sorted(rows: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    return rows if order is None or inverse is None else _Reorder.apply(rows, order, inverse)


class _Reorder(torch.autograd.Function):
    """`rows[order]`. It saves no tensors: a rank whose rows arrive sorted does not call it, and under checkpointing the
    first saved tensor that backward reads decides when the layer, with its collectives, is recomputed.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.order, ctx.inverse = order, inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _Reorder.apply(grad, ctx.inverse, ctx.order), None, None


def _gather_slots(rows: Tensor, slots: Tensor) -> Tensor:
    """The row in each slot, zeros in empty slots: `[n, most, d]` from rows `[N, d]` and slots `[n, most]`."""
    return (
        torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, slots.flatten()).unflatten(0, slots.shape)
    )


class _Take(torch.autograd.Function):
    """`rows[index]`; backward sums a row's gradients in the order of its slots."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, slots: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index, slots)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        _, slots = ctx.saved_tensors
        return _gather_slots(grad, slots).sum(1), None, None


class _SumOf(torch.autograd.Function):
    """The reverse of `_Take`: for each source row, the sum of the rows in its slots."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, slots: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index, slots)
        return _gather_slots(rows, slots).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        index, _ = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class _WeightedSum(torch.autograd.Function):
    """From rows `[C, d]` and weights `[R, k]` to `[R, d]`: for each source row, the weighted sum of its slots' rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, index: Tensor, slots: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, weights, index, slots)
        return (_gather_slots(rows, slots) * weights.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        rows, weights, index, slots = ctx.saved_tensors
        weight = _gather_weights(weights, slots, rows.shape[0])
        to_rows = (grad.index_select(0, index) * weight.unsqueeze(-1)).to(rows.dtype)
        to_weights = (_gather_slots(rows, slots) * grad.unsqueeze(1)).sum(2).to(weights.dtype)
        return to_rows, to_weights, None, None


def _gather_weights(weights: Tensor, slots: Tensor, rows: int) -> Tensor:
    """The weight of each of `rows` rows; every row is in exactly one slot."""
    found = weights.new_empty(rows + 1)
    found[slots.flatten()] = weights.flatten()
    return found[:rows]
