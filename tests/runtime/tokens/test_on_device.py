"""The dispatch whose sizes only the device knows, on the CPU, against the one by kernels with sizes from the host."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.ops.kernels.registered import count_experts
from hecate.placement import Placement, Topology
from hecate.runtime.tokens.by_kernels import kernel_dispatch
from hecate.runtime.tokens.exchange import Dispatch
from hecate.runtime.tokens.on_device import check_capacity, device_dispatch
from tests.runtime.tokens.exchanges import EXPERTS, WIDTH, setting
from tests.workers import Groups

BF16, F32 = torch.bfloat16, torch.float32
WAYS = [(F32, None), (F32, BF16), (BF16, None)]
"""Dtypes of compute and of the wire."""


def run(way: Dispatch, ends: Tensor, hidden: Tensor, weights: Tensor, scale: Tensor) -> list[Tensor]:
    """Output, and gradients of tokens and weights, of experts that scale their rows; other rows become NaN."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    rows = way.dispatch(hidden)
    expert = torch.searchsorted(ends, torch.arange(len(rows)), right=True)
    factor = torch.cat([scale, scale.new_full((1,), float("nan"))])[expert].unsqueeze(1)
    output = way.combine((rows * factor).tanh(), weights)
    output.backward(torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view_as(output))
    return [output.detach(), hidden.grad, weights.grad]


def compare(devices: int, dropped: float) -> None:
    rank, rows_seen = dist.get_rank(), 0
    for seed in range(4):
        plan, picks, topology = setting(devices, 1, seed, dropped)
        comms: Any = SimpleNamespace(rank=rank, topology=topology, tokens=dist.group.WORLD, guard=nullcontext)
        held, index = plan.placement.held_by(rank).tolist()[::-1], picks[rank]
        counts = torch.from_numpy(np.stack([np.bincount(p[p >= 0], minlength=EXPERTS) for p in picks]))
        most = max(int(plan.quota[:, plan.holders[:, 1] == d].sum(1).max()) for d in range(devices))
        for dtype, wire in WAYS:
            generator = torch.Generator().manual_seed(rank)
            hidden = torch.randn(len(index), WIDTH, generator=generator).to(dtype)
            weights = torch.rand(index.shape, generator=generator).masked_fill(index < 0, 0)
            scale = torch.linspace(0.5, 2, EXPERTS, dtype=dtype)[held]
            counted = count_experts(index, EXPERTS)
            expected = kernel_dispatch(plan, index, comms, held, dtype, wire, counted)
            ends = torch.tensor(expected.sizes).cumsum(0).int()
            for capacity in (most, most + 5):
                got = device_dispatch(plan.placement, counts, index, comms, held, dtype, wire, counted, capacity)
                assert torch.equal(got.ends, ends)
                pairs = [run(way, ends, hidden, weights, scale) for way in (got, expected)]
                for name, a, b in zip(("output", "tokens", "weights"), *pairs, strict=True):
                    assert torch.equal(a, b), f"{name}, seed {seed}, {dtype}, {wire}, {capacity} rows"
                rows_seen += sum(expected.sizes)
        too_few = device_dispatch(plan.placement, counts, index, comms, held, F32, BF16, counted, max(1, most // 2))
        run(too_few, too_few.ends, hidden.float(), weights, scale.float())  # no access out of bounds
        check_capacity("moe", plan, most)
        if devices == 1:
            check_capacity("moe", plan, most - 1)  # there is always room
            continue
        with pytest.raises(
            RuntimeError, match=rf"moe: rank \d had {most} rows for rank \d, FSSDPConfig.rows_per_pair="
        ):
            check_capacity("moe", plan, most - 1)
    assert rows_seen


def test_equals_the_dispatch_with_sizes_from_the_host(groups: Groups) -> None:
    groups(1).run(compare, 1, 0.3)
    groups(3).run(compare, 3, 0.0)
    groups(3).run(compare, 3, 0.3)


@pytest.mark.parametrize("picked", [[[2, 0], [-1, 1], [0, 2]], [[1, 2]], []])
def test_on_one_device(picked: list[list[int]]) -> None:
    """Expert 3 is chosen by nobody; three tokens, one, and none."""
    index = torch.tensor(picked, dtype=torch.int64).view(-1, 2)
    comms: Any = SimpleNamespace(rank=0, topology=Topology(1, 1), tokens=None, guard=nullcontext)
    counted, placement = count_experts(index, 4), Placement(np.ones((4, 1)))
    counts, held = counted.counts[None, :4].contiguous(), [0, 1, 2, 3]
    made = device_dispatch(placement, counts, index, comms, held, F32, BF16, counted, None)
    sizes = np.bincount(index[index >= 0], minlength=4)
    assert made.ends.tolist() == np.cumsum(sizes).tolist()
    hidden, weights = torch.randn(len(index), WIDTH), torch.rand(index.shape).masked_fill(index < 0, 0)
    rows = made.dispatch(hidden)
    order = [t for e in range(4) for t in range(len(index)) for j in range(2) if index[t, j] == e]
    assert torch.equal(rows[: sizes.sum()], hidden[order])  # not rounded: nothing travels
    out, grads, _ = run(made, made.ends, hidden, weights, torch.ones(4))
    torch.testing.assert_close(out, hidden.tanh() * weights.sum(1, keepdim=True))
    assert grads.isfinite().all()
