"""The dispatch by Hecate's kernels, whose code runs on the CPU here, against the one by torch's operations."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hecate.ops.kernels.registered import count_experts
from hecate.placement import Topology
from hecate.runtime.tokens.by_kernels import kernel_dispatch
from hecate.runtime.tokens.counts import Counting, Position
from hecate.runtime.tokens.direct import direct_dispatch
from tests.runtime.tokens.exchanges import BF16, EXPERTS, F32, WAYS, WIDTH, AsModel, run, setting
from tests.workers import Groups


def compare(devices: int, dropped: float) -> None:
    rank = dist.get_rank()
    for seed in range(3):
        plan, picks, topology = setting(devices, 1, seed, dropped)
        tokens = dist.group.WORLD if devices > 1 else None
        comms = SimpleNamespace(rank=rank, topology=topology, tokens=tokens, guard=nullcontext)
        held, index = plan.placement.held_by(rank).tolist(), picks[rank]
        counted = count_experts(index, EXPERTS)
        for home, dtype, wire in WAYS:
            generator = torch.Generator().manual_seed(rank)
            hidden = torch.randn(len(index), WIDTH, generator=generator).to(home)
            weights = torch.rand(index.shape, generator=generator).masked_fill(index < 0, 0)
            scale = torch.linspace(0.5, 2, EXPERTS, dtype=dtype)[held].unsqueeze(1)
            expected = direct_dispatch(plan, index, comms, held, wire)
            got = kernel_dispatch(plan, index, comms, held, dtype, wire, counted)
            assert (got.sizes, got.sent) == (expected.sizes, expected.sent)
            assert torch.equal(got.order, expected.order)
            pairs = [run(AsModel(way, home, dtype), hidden, weights, scale) for way in (got, expected)]
            away = 1e-6 if {home, dtype, wire} <= {F32, None} else 2**-6
            for name, a, b in zip(("output", "tokens", "weights"), *pairs, strict=True):
                message = f"{name}, seed {seed}, {home}, {dtype}, {wire}"
                torch.testing.assert_close(
                    a, b.masked_fill(index < 0, 0) if name == "weights" else b, rtol=away, atol=away, msg=message
                )


def test_equals_the_dispatch_by_torch(groups: Groups) -> None:
    groups(3).run(compare, 3, 0.0)
    groups(3).run(compare, 3, 0.3)


def test_on_one_device() -> None:
    index, comms = torch.tensor([[2, 0], [-1, 1], [0, 2]]), SimpleNamespace(rank=0, topology=Topology(1, 1))
    comms.tokens, comms.guard = None, nullcontext
    plan = SimpleNamespace(
        owners=np.zeros(3, dtype=np.int64), holders=np.array([[0, 0], [1, 0], [2, 0]]), quota=np.array([[2, 1, 2]])
    )
    record = kernel_dispatch(plan, index, comms, [0, 1, 2], F32, BF16, count_experts(index, 3))  # type: ignore[arg-type]
    hidden = torch.randn(3, WIDTH)
    assert torch.equal(record.dispatch(hidden), hidden[[0, 2, 1, 0, 2]])  # not rounded: nothing travels
    weights = torch.rand(3, 2).masked_fill(index < 0, 0)
    expected = hidden * weights.sum(1, keepdim=True)
    torch.testing.assert_close(record.combine(record.dispatch(hidden), weights), expected)


def test_counts_by_the_kernel_are_those_by_torch() -> None:
    comms: Any = SimpleNamespace(rank=0, topology=Topology(1, 1), tokens=None, replicas=None)
    position, weights = Position(3, 0, 0, True, 1), torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    for index in ([[4, 0], [1, 1]], [[-1, 7], [5, -9]], [[2**40, -1], [-1, -(2**40)]]):
        for experts in ((5,), (5, 9)):
            chosen = torch.tensor(index)
            rows = [Counting(position, chosen, weights, experts, comms, by)._table for by in (False, True)]
            above, below = max(experts), max(experts) + 1
            rows[0][above] += rows[0][below]
            rows[0][below] = 0
            assert torch.equal(*rows)


def test_no_experts_per_token() -> None:
    index = torch.empty(4, 0, dtype=torch.int64)
    comms = SimpleNamespace(rank=0, topology=Topology(1, 1), tokens=None, guard=nullcontext)
    plan = SimpleNamespace(owners=np.zeros(2, int), holders=np.array([[0, 0], [1, 0]]), quota=np.array([[0, 0]]))
    record = kernel_dispatch(plan, index, comms, [0, 1], F32, None, count_experts(index, 2))  # type: ignore[arg-type]
    out = record.combine(record.dispatch(torch.ones(4, WIDTH)), torch.empty(4, 0))
    assert torch.equal(out, torch.zeros(4, WIDTH))
