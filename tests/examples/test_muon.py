"""The batched Muon of the examples against torch's, one expert's matrix at a time, in one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.examples.muon import BatchedMuon, orthogonal, split_parameters
from tests.adapters.parity import batch, close
from tests.adapters.tiny import tiny_model
from tests.adapters.ways import CONFIG, loss_of
from tests.workers import Groups


def step_with_muon() -> None:
    """Three steps, with re-sharding after the second: the momentum must move with the experts."""
    plain = tiny_model("qwen3_moe", moe_intermediate_size=64)
    engine = hecate.fully_shard(copy.deepcopy(plain), None, CONFIG)
    matrices, others = split_parameters(engine.model)
    assert len(matrices) == 2
    assert all(p.ndim < 3 for p in others)
    optimizer = BatchedMuon(matrices, lr=0.01, weight_decay=0.1)
    single = {name: [nn.Parameter(w.detach().clone()) for w in p] for name, p in stacked(plain).items()}
    everything = [w for stack in single.values() for w in stack]
    expected = torch.optim.Muon(everything, lr=0.01, weight_decay=0.1, adjust_lr_fn="original")
    for step in range(3):
        loss_of(engine.model, batch(step, dist.get_rank())).backward()
        gradients = put_gradients(engine, step)
        for name, stack in single.items():
            for weight, gradient in zip(stack, gradients[name], strict=True):
                weight.grad = gradient.clone()
        optimizer.step()
        expected.step()
        engine.model.zero_grad()
    assert engine.stats()["step"] == 3
    state = engine.full_state_dict()
    for name, start in stacked(plain).items():
        change = torch.stack([w.detach() for w in single[name]]) - start.detach()
        close(name, state[name] - start.detach(), change, 2e-2)  # bf16 in both


def put_gradients(engine: hecate.FSSDP, step: int) -> dict[str, Tensor]:
    """Random ones by name, in place of the true ones: those have null spaces, where bf16 noise becomes a direction."""
    made = {}
    for pool in engine.pools:
        for row, spec in enumerate(pool.specs):
            for weight in spec.weights:
                seed = 1000 * step + 10 * row + len(weight.kind)
                shape = (spec.num_experts, *weight.shape)
                full = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                pool.gradient(weight.kind)[pool.rows(row)] = full[torch.from_numpy(pool.owned(row))]
                made[f"{spec.name}.{weight.kind}"] = full
    return made


def stacked(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3}


def test_experts_move_as_with_torchs_muon(groups: Groups) -> None:
    groups(2).run(step_with_muon)


def test_orthogonal() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 20)
    stack[1] = 0
    for matrices in (stack, stack.mT):
        made: Tensor = orthogonal(matrices)
        values = torch.linalg.svdvals(made)
        assert made.shape == matrices.shape
        assert not made[1].any()
        assert values[::2].min() > 0.6
        assert values[::2].max() < 1.3


def test_only_stacks() -> None:
    with pytest.raises(ValueError, match=r"parameters of shapes \[\(4, 4\)\]; must be stacks"):
        BatchedMuon([nn.Parameter(torch.zeros(4, 4))])
