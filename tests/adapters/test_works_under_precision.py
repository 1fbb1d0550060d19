"""Compute in bf16 from fp32 master weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import hecate
from tests.adapters.parity import adamw, batch, close, spread_router
from tests.adapters.tiny import tiny_model
from tests.adapters.ways import CONFIG, compare_gradients, loss_of
from tests.runtime.reference import full_gradients
from tests.workers import Groups

TOLERANCE = 3e-2
"""bf16 keeps 8 bits; a gradient is a sum of many roundings."""


def compute_in_bf16(dense: str, reduce_dtype: torch.dtype | None) -> None:
    """Gradients are those of the rounded weights, and master weights take steps too small for bf16."""
    plain = spread_router(tiny_model("qwen3_moe"))
    config = replace(CONFIG, dense=dense, param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    engine = hecate.fully_shard(copy.deepcopy(plain), None, config)
    optimizer = adamw(engine.model)
    before = engine.full_state_dict()
    loss = loss_of(engine.model, batch(0, dist.get_rank()))
    loss.backward()
    gradients = full_gradients(engine)
    optimizer.step()
    after = engine.full_state_dict()
    dist.all_reduce(loss := loss.detach().float())
    if dist.get_rank() == 0:
        rounded = plain.bfloat16()
        expected = torch.zeros(())
        for rank in range(dist.get_world_size()):
            part = loss_of(rounded, batch(0, rank)) / dist.get_world_size()
            part.backward()
            expected += part.detach()
        close("loss", loss / dist.get_world_size(), expected, TOLERANCE)
        compare_gradients("bf16", gradients, rounded, TOLERANCE)
    for name, value in after.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name
        assert not torch.equal(value, value.bfloat16().float()), name


@pytest.mark.parametrize(("dense", "reduce_dtype"), [("fsdp", None), ("fsdp", torch.float32), ("replicate", None)])
def test_compute_in_bf16(groups: Groups, dense: str, reduce_dtype: torch.dtype | None) -> None:
    groups(2).run(compute_in_bf16, dense, reduce_dtype)
