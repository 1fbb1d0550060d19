"""The dispatch in two halves against the whole one: the same bits, by torch's operations and by kernels."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.cost import CostModel, LayerCost
from hecate.ops.kernels.registered import count_experts
from hecate.placement import Placement, Topology
from hecate.planning.plan import Plan
from hecate.planning.quota import exact_quota
from hecate.runtime.tokens.by_kernels import kernel_dispatch
from hecate.runtime.tokens.direct import direct_dispatch
from hecate.runtime.tokens.halves import HalvedDispatch, halved, halves_pay
from tests.runtime.tokens.exchanges import EXPERTS, WAYS, WIDTH, AsModel, run, setting
from tests.workers import Groups


class InTurn:
    """Both halves of a dispatch, one behind the other, as one dispatch."""

    def __init__(self, halves: HalvedDispatch, home: torch.dtype, dtype: torch.dtype) -> None:
        self._halves, self._home, self._dtype = halves, home, dtype
        self.sizes = tuple(size for half in halves.halves for size in half.sizes)

    def dispatch(self, hidden: Tensor) -> Tensor:
        begun = self._halves.begin(hidden, self._dtype, lambda: None)
        return torch.cat([each.end() for each in begun])

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        parts = rows.split([sum(half.sizes) for half in self._halves.halves])
        begun = [self._halves.begin_return(*each) for each in zip(self._halves.halves, parts, strict=True)]
        return self._halves.add_up([each.end() for each in begun], weights, self._home)


def compare(dropped: float) -> None:
    rank, devices = dist.get_rank(), dist.get_world_size()
    for seed in range(3):
        plan, picks, topology = setting(devices, 1, seed, dropped)
        comms = SimpleNamespace(rank=rank, topology=topology, tokens=dist.group.WORLD, guard=nullcontext)
        held, index = plan.placement.held_by(rank).tolist(), picks[rank]
        for home, dtype, wire in WAYS:
            by_kernels = kernel_dispatch(plan, index, comms, held, dtype, wire, count_experts(index, EXPERTS))
            for whole in (by_kernels, direct_dispatch(plan, index, comms, held, wire)):
                halves = halved(whole, plan, held)
                sizes = [half.sizes for half in halves.halves]
                assert tuple(map(sum, zip(*sizes, strict=True))) == whole.sizes
                generator = torch.Generator().manual_seed(rank)
                hidden = torch.randn(len(index), WIDTH, generator=generator).to(home)
                weights = torch.rand(index.shape, generator=generator).masked_fill(index < 0, 0)
                scale = torch.linspace(0.5, 2, EXPERTS, dtype=dtype)[held].unsqueeze(1)
                got = run(InTurn(halves, home, dtype), hidden, weights, scale.repeat(2, 1))
                expected = run(AsModel(whole, home, dtype), hidden, weights, scale)
                for name, a, b in zip(("output", "tokens", "weights"), got, expected, strict=True):
                    assert torch.equal(a, b), f"{name}, seed {seed}, {home}, {dtype}, {wire}, {type(whole).__name__}"


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_equals_the_whole(groups: Groups, dropped: float) -> None:
    groups(3).run(compare, dropped)


COST = LayerCost(
    CostModel(intra_node_bandwidth=10**9, inter_node_bandwidth=10**9, message_ns=1000, flops=10**9),
    expert_bytes=1,
    gradient_bytes=1,
    token_flops=6000,  # 6 us for each row
    token_bytes=2000,  # 2 us for each row
    dense_token_flops=1,
)


def _even(tokens: int, per_node: int = 4) -> Plan:
    """A plan of 4 devices, each with an expert, to which it sends `tokens` tokens in all."""
    topology = Topology(4, per_node)
    counts, owners = np.full((4, 4), tokens // 4), np.arange(4)
    placement = Placement.from_owners(owners, 4)
    return Plan.build(placement, owners, topology, exact_quota(counts, placement, topology))


def _model(**changes: int) -> LayerCost:
    return replace(COST, model=replace(COST.model, **changes))


@pytest.mark.parametrize("per_node", [4, 1])
def test_pay_where_exchange_and_compute_take_as_long(per_node: int) -> None:
    assert halves_pay(_even(4096, per_node), COST)


@pytest.mark.parametrize(
    ("tokens", "cost"),
    [
        (4, COST),  # messages take longer than rows
        (4096, _model(hidden_permille=0)),
        (4096, _model(intra_node_bandwidth=10**12)),  # no exchange to hide
        (4096, _model(flops=10**12)),  # nothing to hide it behind
        (4096, _model(flops=10**6)),  # a small part of the layer
    ],
)
def test_do_not_pay(tokens: int, cost: LayerCost) -> None:
    assert not halves_pay(_even(tokens), cost)
