"""The node-aware exchange gives the same outputs and gradients as the plain one, within rounding."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.cost import CostModel, LayerCost
from hecate.placement import Placement, Topology
from hecate.planning.plan import Plan
from hecate.planning.quota import exact_quota
from hecate.runtime.tokens.by_node import node_dispatch, node_exchange_pays
from hecate.runtime.tokens.direct import direct_dispatch
from hecate.runtime.tokens.exchange import Dispatch
from tests.workers import Groups

EXPERTS, TOP_K, WIDTH = 12, 4, 8


def setting(devices: int, per_node: int, seed: int) -> tuple[Plan, list[Tensor], Topology]:
    """A plan with copies for a random router; device 0 has no tokens in every third setting."""
    rng = np.random.default_rng([devices, per_node, seed])
    topology = Topology(devices, per_node)
    picks = []
    for device in range(devices):
        tokens = 0 if seed % 3 == 0 and device == 0 else int(rng.integers(1, 20))
        rows = [rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]
        picks.append(torch.from_numpy(np.array(rows, dtype=np.int64).reshape(tokens, TOP_K)))
    counts = np.stack([np.bincount(p.flatten().numpy(), minlength=EXPERTS) for p in picks]).astype(np.int64)
    owners = rng.integers(0, devices, EXPERTS)
    placement = Placement.from_owners(owners, devices) | Placement(rng.random((EXPERTS, devices)) < 0.3)
    return Plan.build(placement, owners, topology, exact_quota(counts, placement, topology)), picks, topology


def run(record: Dispatch, hidden: Tensor, weights: Tensor, scale: Tensor) -> list[Tensor]:
    """Output, and gradients of tokens and weights, of experts that scale their rows."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    rows = record.dispatch(hidden)
    factor = torch.repeat_interleave(scale, torch.tensor(record.sizes), dim=0)
    output = record.combine((rows * factor).tanh(), weights)
    output.backward(torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view_as(output))
    return [output.detach(), hidden.grad, weights.grad]


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
        assert aware <= min(plain, len(tokens))
    assert sum(aware for _, aware in rows) < sum(plain for plain, _ in rows)


def cost(inter: int) -> LayerCost:
    model = CostModel(intra_node_bandwidth=10**9, inter_node_bandwidth=inter, message_ns=10_000)
    return LayerCost(model, 1, 1, 1, token_bytes=4096, dense_token_flops=1)


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
