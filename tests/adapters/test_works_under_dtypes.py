"""Models whose parameters have several dtypes, or no dimensions: what FSDP2 takes one group of a block for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import hecate
from tests.adapters.parity import BF16_TOLERANCE, adamw, batch
from tests.adapters.tiny import skip_unknown, tiny_model
from tests.adapters.ways import CONFIG, Way, compare_way, loss_of
from tests.workers import Groups

MODEL = "kimi_linear"
"""Float32: a router, and one of the weights of an attention module whose others are bfloat16."""
IN_BF16 = Way(MODEL, model={"dtype": torch.bfloat16}, steps=1, tolerance=BF16_TOLERANCE)


def step(engine: hecate.FSSDP, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    """One optimizer step, its gradients clipped by torch; the loss."""
    loss = loss_of(engine.model, batch(number, dist.get_rank()))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(engine.model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def on_meta(config: hecate.FSSDPConfig) -> hecate.FSSDP:
    with torch.device("meta"):
        model = tiny_model(MODEL, dtype=torch.bfloat16)
    return hecate.fully_shard(model, None, config)


def saved_and_resumed(folder: Path, config: hecate.FSSDPConfig) -> None:
    """Meta device, checkpoint and folder of transformers keep values and dtypes; a resumed run gives the same bits."""
    engine = on_meta(config)
    engine.init_weights(0)
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32, torch.bfloat16}
    optimizer = adamw(engine.model)
    step(engine, optimizer, 0)
    engine.save(folder / "checkpoint", optimizer)
    engine.save_pretrained(folder / "pretrained")
    state = engine.full_state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(folder / "pretrained").state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name
    resumed = on_meta(config)
    resumed_optimizer = adamw(resumed.model)
    resumed.load(folder / "checkpoint", resumed_optimizer)
    assert torch.equal(step(engine, optimizer, 1), step(resumed, resumed_optimizer, 1))
    for (name, value), other in zip(engine.full_state_dict().items(), resumed.full_state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@skip_unknown(MODEL)
def test_saved_and_resumed(groups: Groups, tmp_path: Path) -> None:
    for dense in ("fsdp", "replicate"):
        groups(2).run(saved_and_resumed, tmp_path / dense, replace(CONFIG, dense=dense))


def groups_by_dtype() -> None:
    """All weights are sharded, and a group's are gathered with its block's."""
    model = tiny_model(MODEL, dtype=torch.bfloat16)
    hecate.fully_shard(model, None, CONFIG)
    assert all(p.placements[0].is_shard() for p in model.parameters() if isinstance(p, DTensor))
    gate = model.model.layers[1].mlp.gate
    seen = []
    gate.register_forward_pre_hook(lambda module, args: seen.append((type(gate.weight), gate.weight.dtype)))
    loss_of(model, batch(0, dist.get_rank())).backward()
    assert seen == [(nn.Parameter, torch.float32)]
    assert isinstance(gate.weight.grad, DTensor)
    assert gate.weight.grad.dtype == torch.float32


@skip_unknown(MODEL)
def test_groups_by_dtype(groups: Groups) -> None:
    groups(2).run(groups_by_dtype)


def without_groups(way: Way) -> None:
    """As with torch 2.11."""
    with patch("hecate.runtime.dense.fsdp.shard_beside", return_value=False):
        model = tiny_model(MODEL, dtype=torch.bfloat16)
        hecate.fully_shard(model, None, CONFIG)
        weight = model.model.layers[1].mlp.gate.weight
        assert isinstance(weight, DTensor)
        assert weight.placements[0].is_replicate()
        compare_way(way)


@skip_unknown(MODEL)
def test_what_is_not_grouped_is_replicated(groups: Groups) -> None:
    groups(2).run(without_groups, IN_BF16)


class ScaledHead(nn.Linear):
    """A linear layer with a temperature, which has no dimensions."""

    temperature: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature


def with_temperature(model: nn.Module) -> nn.Module:
    head = model.lm_head
    head.__class__ = ScaledHead
    head.temperature = nn.Parameter(torch.tensor(1.5, dtype=head.weight.dtype))
    return model


def test_parameters_without_dimensions_are_replicated(groups: Groups) -> None:
    groups(2).run(compare_way, Way(prepare=with_temperature, micro_batches=2))


class Wrapper(nn.Module):
    """A model inside another one, as people put losses and heads around them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> object:
        return self.inner(**inputs)


def blocks_in_a_wrapper() -> None:
    """The layers that the inner model names are units, dense ones too."""
    model = Wrapper(tiny_model("qwen3_moe", mlp_only_layers=[0]))
    hecate.fully_shard(model, None, CONFIG)
    assert [isinstance(layer, FSDPModule) for layer in model.inner.model.layers] == [True, True]
    assert not any(isinstance(layer.mlp, FSDPModule) for layer in model.inner.model.layers)


def test_blocks_in_a_wrapper(groups: Groups) -> None:
    groups(2).run(blocks_in_a_wrapper)
    groups(2).run(compare_way, Way(prepare=Wrapper, steps=1))
