"""Random plans, one exchange of tokens by them, and what exchanges do when: what tests of dispatches have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from hecate.cost import CostModel, LayerCost
from hecate.placement import Placement, Topology
from hecate.planning.plan import Plan
from hecate.planning.quota import exact_quota
from hecate.runtime.tokens import by_kernels, direct
from hecate.runtime.tokens.exchange import Dispatch, Sending

EXPERTS, TOP_K, WIDTH = 12, 4, 8
BF16, F32 = torch.bfloat16, torch.float32
WAYS = [(F32, F32, None), (F32, F32, BF16), (BF16, BF16, None), (F32, BF16, None), (BF16, F32, BF16)]
"""Dtypes of hidden states, of compute and of the wire."""


class AsModel(Dispatch):
    """A dispatch between hidden states of one dtype and experts of another."""

    def __init__(self, inner: Dispatch, home: torch.dtype, dtype: torch.dtype) -> None:
        self.sizes, self._inner, self._home, self._dtype = inner.sizes, inner, home, dtype

    def dispatch(self, hidden: Tensor, *_: Any) -> Tensor:
        rows = self._inner.dispatch(hidden, self._dtype)
        assert rows.dtype == self._dtype
        return rows

    def combine(self, rows: Tensor, weights: Tensor, dtype: Any = None) -> Tensor:
        return self._inner.combine(rows, weights, self._home)


def setting(devices: int, per_node: int, seed: int, dropped: float = 0.0) -> tuple[Plan, list[Tensor], Topology]:
    """A plan with copies for a random router; device 0 has no tokens in every third setting.

    A share of the copies, `dropped`, has no expert.
    """
    rng = np.random.default_rng([devices, per_node, seed])
    topology = Topology(devices, per_node)
    picks = []
    for device in range(devices):
        tokens = 0 if seed % 3 == 0 and device == 0 else int(rng.integers(1, 20))
        rows = [rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]
        picked = np.array(rows, dtype=np.int64).reshape(tokens, TOP_K)
        if dropped:
            picked[rng.random(picked.shape) < dropped] = -1
        picks.append(torch.from_numpy(picked))
    counts = np.stack([np.bincount(p[p >= 0].numpy(), minlength=EXPERTS) for p in picks]).astype(np.int64)
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


def cost(inter: int) -> LayerCost:
    model = CostModel(intra_node_bandwidth=10**9, inter_node_bandwidth=inter, message_ns=10_000)
    return LayerCost(model, 1, 1, 1, token_bytes=4096, dense_token_flops=1)


@contextmanager
def noted(events: list[str]) -> Iterator[None]:
    """Add "launch" and "wait" to `events` for each exchange of the direct dispatches."""

    class Noted(Sending):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            events.append("launch")

        def wait(self) -> Tensor:
            events.append("wait")
            return super().wait()

    with patch.object(direct, "Sending", Noted), patch.object(by_kernels, "Sending", Noted):
        yield
