"""Node-aware token exchange: a token is sent to each other node at most once, however many of its experts are there.

The token goes to a relay: the device that has the sender's index within its node. The relay forwards it to the experts'
devices and sums their results before they return. Results equal those of the plain exchange up to rounding, and the
order of every sum is fixed. With a wire dtype, rows are rounded whenever they leave a device; the relay sums in float32
(or the compute dtype if that is wider) and rounds the sum once for the wire.

Shapes: T tokens of this device, k experts per token, n nodes, U (token, node) pairs sent, R such pairs received as a
relay, C copies that the relay forwards, M rows computed here, d model width, D devices, P (expert, device) pairs of the
plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hecate.cost import LayerCost
from hecate.ops.permute import invert, permute
from hecate.placement import Topology
from hecate.planning.plan import Plan
from hecate.runtime.comms import Comms
from hecate.runtime.tokens.exchange import AllToAll, Dispatch, order_by_expert, sorted_by_expert

__all__ = ["NodeDispatch", "node_dispatch", "node_exchange_pays"]


@dataclass(frozen=True)
class Leg:
    """One of the two exchanges: which source rows are sent, and how many go to each device.

    Attributes:
        index: int64 `[rows sent]`, the source row of each sent row.
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
        across: exchange between nodes: from T tokens to the U rows sent to relays, sorted by (node, token).
        here: bool `[U, k]`, which of the token's k copies are computed in that node.
        inside: exchange within the node: from R rows at the relay to C rows, sorted by (device, expert).
        local_order, local_inverse: int64 `[M]`, received rows sorted by (row of the expert here, relay).
        sizes: received rows per expert held here, in the order of the experts' rows.
        wire: dtype of rows between devices; None keeps theirs.
        comms: process groups of the devices that share the experts.
    """

    across: Leg
    here: Tensor
    inside: Leg
    local_order: Tensor
    local_inverse: Tensor
    sizes: tuple[int, ...]
    wire: torch.dtype | None
    comms: Comms

    def dispatch(self, hidden: Tensor) -> Tensor:
        rows = _Take.apply(hidden, self.across.index, self.across.slots)
        rows = self._across(rows, back=False)
        rows = _Take.apply(rows, self.inside.index, self.inside.slots)
        rows = AllToAll.apply(rows, self.inside.sent, self.inside.received, self.comms, self.wire)
        return permute(rows, self.local_order, self.local_inverse, 1)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        across, inside = self.across, self.inside
        shares = _Take.apply(weights, across.index, across.slots) * self.here
        shares = AllToAll.apply(shares, across.sent, across.received, self.comms, None)
        if self.wire is not None:
            shares = shares.to(torch.promote_types(shares.dtype, torch.float32))  # dtype of the sums below
        copies = permute(rows, self.local_inverse, self.local_order, 1)
        copies = AllToAll.apply(copies, inside.received, inside.sent, self.comms, self.wire)
        sums = _WeightedSum.apply(copies, shares, inside.index, inside.slots)
        sums = self._across(sums, back=True)
        return _SumOf.apply(sums, across.index, across.slots).to(rows.dtype)

    def _across(self, rows: Tensor, back: bool) -> Tensor:
        leg = self.across
        sent, received = (leg.received, leg.sent) if back else (leg.sent, leg.received)
        return AllToAll.apply(rows, sent, received, self.comms, self.wire)


def node_exchange_pays(plan: Plan, cost: LayerCost, top_k: int) -> bool:
    """Whether the node-aware exchange is predicted to be faster. Integers only, so the answer is the same on all ranks.

    The number of a device's tokens that have an expert in a node is estimated as if each token chose its experts
    independently.
    """
    topology = plan.topology
    node = plan.holders[:, 1] // topology.devices_per_node
    to_node = np.stack([plan.quota[:, node == n].sum(axis=1) for n in range(topology.num_nodes)], axis=1)
    plain = together = handed_on = 0
    for device, copies in enumerate(to_node.tolist()):
        tokens = sum(copies) // top_k
        foreign = [c for n, c in enumerate(copies) if n != topology.node_of(device)]
        missing = [(sum(copies) - c) ** top_k * tokens // max(1, sum(copies)) ** top_k for c in foreign]
        plain = max(plain, sum(foreign))
        together = max(together, sum(tokens - m for m in missing))
        handed_on = max(handed_on, sum(copies))
    model, size = cost.model, cost.token_bytes
    messages = topology.num_devices * model.message_ns
    plain_ns = 2 * (messages + plain * size * 1_000_000_000 // model.inter_node_bandwidth)
    # Row counts, the copies' pairs and weights cross between nodes too; every copy is forwarded inside the node.
    extra = 8 * top_k
    across_ns = together * (2 * size + extra) * 1_000_000_000 // model.inter_node_bandwidth
    inside_ns = 2 * handed_on * size * 1_000_000_000 // model.intra_node_bandwidth
    # Require that a third of the time is saved: packing at relays and waiting for their counts are not in the model.
    return topology.num_nodes > 1 and 3 * (7 * messages + across_ns + inside_ns) < 2 * plain_ns


def node_dispatch(
    plan: Plan, index: Tensor, comms: Comms, local_rows: Sequence[int], wire: torch.dtype | None = None
) -> NodeDispatch:
    """Make this device's dispatch according to `plan`. Collective.

    Args:
        plan: made from the counts of `index`, so that this device's quota row adds up to them.
        index: `[T, k]` expert of each token copy; -1: none.
        comms: this device's process groups and topology.
        local_rows: experts held here, in the order of their rows.
        wire: dtype of rows between devices, e.g. torch.bfloat16; None keeps theirs.
    """
    topology, rank, device = comms.topology, comms.rank, index.device
    per_node = topology.devices_per_node
    pair_of = _pairs_of_copies(plan, index, rank)  # [T, k]
    holder = torch.from_numpy(plan.holders[:, 1].copy()).to(device)
    node_of = torch.where(pair_of >= 0, holder[pair_of] // per_node, -1)
    nodes = torch.arange(topology.num_nodes, device=device).view(-1, 1, 1)
    copies = node_of == nodes  # [n, T, k]
    present = copies.any(2)
    sent, received = _exchange_counts(present.sum(1), comms)
    place, token = torch.nonzero_static(present, size=sum(sent)).unbind(1)  # by node and token
    slots = torch.full((index.shape[0], topology.num_nodes), token.numel(), device=device)
    slots[token, place] = torch.arange(token.numel(), device=device)
    across = Leg(token, slots, sent, received)
    here = copies[place, token]

    meant = torch.where(here, pair_of[token], -1)
    at_relay = meant.new_empty(sum(received), index.shape[1])
    dist.all_to_all_single(at_relay, meant, list(received), list(sent), group=comms.tokens)
    inside, by_relay = _inside(plan, at_relay, topology, rank)
    local_order, sizes = order_by_expert(plan, by_relay, rank, local_rows, device)
    return NodeDispatch(across, here, inside, local_order, invert(local_order), sizes, wire, comms)


def _pairs_of_copies(plan: Plan, index: Tensor, rank: int) -> Tensor:
    """The (expert, device) pair of each token copy, `[T, k]`; -1: the copy has no expert.

    If copies are sorted by expert, those of one pair are a consecutive block, whose length is the pair's quota.
    """
    copies = int(plan.quota[rank].sum())
    by_expert = sorted_by_expert(index, copies)
    quota = torch.from_numpy(plan.quota[rank].copy()).to(index.device)
    pairs = torch.repeat_interleave(torch.arange(quota.numel(), device=index.device), quota, output_size=copies)
    return by_expert.new_full((index.numel(),), -1).scatter_(0, by_expert, pairs).view(index.shape)


def _exchange_counts(to_node: Tensor, comms: Comms) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Exchange numbers of rows; returns those to and from each device.

    Rows to a node go to its relay: the device with this device's index within the node.
    """
    topology = comms.topology
    sent = to_node.new_zeros(topology.num_devices)
    sent[comms.rank % topology.devices_per_node :: topology.devices_per_node] = to_node
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=comms.tokens)
    both = torch.stack([sent, received]).tolist()  # waits for the device only once
    return tuple(both[0]), tuple(both[1])


def _inside(plan: Plan, at_relay: Tensor, topology: Topology, rank: int) -> tuple[Leg, NDArray[np.int64]]:
    """The exchange within the node, as seen by a relay.

    Args:
        plan: the plan.
        at_relay: int64 `[R, k]`, the (expert, device) pairs that each received row goes to; -1: none.
        topology: devices and nodes.
        rank: this device.

    Returns:
        The leg, and int64 `[D, P]`: rows that each relay sends to each pair (zero for relays in other nodes).
    """
    per_node, devices = topology.devices_per_node, topology.num_devices
    expert, holder = plan.holders.T
    rank_of_pair = np.empty(len(holder), dtype=np.int64)
    rank_of_pair[np.lexsort((expert, holder))] = np.arange(len(holder))
    near = holder // per_node == topology.node_of(rank)
    # A relay receives all tokens from devices that have its index within their nodes.
    by_relay = np.zeros_like(plan.quota)
    for place in range(per_node):
        relay = topology.node_of(rank) * per_node + place
        by_relay[relay] = plan.quota[place::per_node].sum(axis=0) * near
    order_key = torch.from_numpy(rank_of_pair).to(at_relay.device)
    flat = at_relay.flatten()
    copies = int(by_relay[rank].sum())
    key = torch.where(flat >= 0, order_key[flat.clamp(min=0)], len(holder))
    taken = torch.argsort(key, stable=True)[:copies]
    slots = torch.full_like(flat, copies)
    slots[taken] = torch.arange(copies, device=flat.device)
    sent = np.bincount(holder, weights=by_relay[rank], minlength=devices).astype(np.int64)
    received = by_relay[:, holder == rank].sum(axis=1)
    index = taken // at_relay.shape[1]
    return Leg(index, slots.view_as(at_relay), tuple(sent.tolist()), tuple(received.tolist())), by_relay


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
