"""The node-aware exchange gives the same outputs and gradients as the plain one, within rounding."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.placement import Placement, Topology
from hecate.planning.plan import Plan
from hecate.planning.quota import exact_quota
from hecate.runtime.tokens.by_node import node_dispatch, node_exchange_pays
from hecate.runtime.tokens.direct import direct_dispatch
from tests.runtime.tokens.exchanges import EXPERTS, WIDTH, cost, run, setting
from tests.workers import Groups


def compare(devices: int, per_node: int, dtype: torch.dtype, tolerance: float) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    for seed in range(6):
        plan, picks, topology = setting(devices, per_node, seed)
        comms = SimpleNamespace(rank=rank, topology=topology, tokens=group, guard=nullcontext)
        index = picks[rank]
        held = plan.placement.held_by(rank).tolist()
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        hidden = torch.randn(len(index), WIDTH, generator=generator, dtype=dtype)
        weights = torch.rand(index.shape, generator=generator, dtype=dtype)
        scale = torch.linspace(0.5, 2, EXPERTS, dtype=dtype)[held].unsqueeze(1)
        plain = direct_dispatch(plan, index, comms, held)
        aware = node_dispatch(plan, index, comms, held)
        assert aware.sizes == plain.sizes
        expected = run(plain, hidden, weights, scale)
        got = run(aware, hidden, weights, scale)
        again = run(aware, hidden, weights, scale)
        for name, a, b, c in zip(("output", "tokens", "weights"), expected, got, again, strict=True):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), f"{name}, seed {seed}"
            assert torch.equal(b, c), f"{name}, seed {seed}: another run, other bits"


@pytest.mark.parametrize(("devices", "per_node"), [(1, 1), (2, 1), (4, 2), (5, 5), (5, 1)])
def test_equals_the_plain_exchange(groups: Groups, devices: int, per_node: int) -> None:
    groups(devices).run(compare, devices, per_node, torch.float64, 1e-12)
    groups(devices).run(compare, devices, per_node, torch.float32, 1e-5)


def crossing(devices: int, per_node: int) -> tuple[int, int]:
    """Number of rows that leave this node in the plain exchange, and in the node-aware one."""
    rank = dist.get_rank()
    plan, picks, topology = setting(devices, per_node, 1)
    owned = Placement.from_owners(plan.owners, devices)  # without copies, most rows leave their node
    plan = Plan.build(owned, plan.owners, topology, exact_quota(plan.counts, owned, topology))
    comms = SimpleNamespace(rank=rank, topology=topology, tokens=dist.group.WORLD, guard=nullcontext)
    held = plan.placement.held_by(rank).tolist()
    plain = direct_dispatch(plan, picks[rank], comms, held)
    aware = node_dispatch(plan, picks[rank], comms, held)
    foreign = [topology.node_of(d) != topology.node_of(rank) for d in range(devices)]
    assert not any(n for n, far in zip(aware.inside.sent, foreign, strict=True) if far)
    return tuple(
        sum(n for n, far in zip(sent, foreign, strict=True) if far) for sent in (plain.sent, aware.across.sent)
    )


def test_a_token_crosses_to_a_node_once(groups: Groups) -> None:
    _, picks, _ = setting(4, 2, 1)
    rows = groups(4).run(crossing, 4, 2)
    for tokens, (plain, aware) in zip(picks, rows, strict=True):
        assert aware == min(plain, len(tokens))
    assert sum(aware for _, aware in rows) < sum(plain for plain, _ in rows)


def uniform(tokens: int, top_k: int, topology: Topology) -> Plan:
    experts = 64
    owners = np.repeat(np.arange(topology.num_devices), experts // topology.num_devices)
    counts = np.full((topology.num_devices, experts), tokens * top_k // experts)
    placement = Placement.from_owners(owners, topology.num_devices)
    return Plan.build(placement, owners, topology, exact_quota(counts, placement, topology))


def test_pays_where_borders_are_slow_and_tokens_have_many_experts() -> None:
    two_nodes = Topology(8, 4)
    slow, fast = cost(50_000_000), cost(10**9)
    assert node_exchange_pays(uniform(1024, 8, two_nodes), slow, 8)
    assert not node_exchange_pays(uniform(1024, 1, two_nodes), slow, 1)
    assert not node_exchange_pays(uniform(512, 2, two_nodes), cost(12_700_000), 2)
    assert node_exchange_pays(uniform(512, 8, two_nodes), cost(12_700_000), 8)
    assert not node_exchange_pays(uniform(1024, 8, two_nodes), fast, 8)
    assert not node_exchange_pays(uniform(64, 8, two_nodes), cost(10**12), 8)
    assert not node_exchange_pays(uniform(1024, 8, Topology(8, 8)), slow, 8)
