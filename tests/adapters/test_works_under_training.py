"""Ways to train a model of transformers or Hecate's GPT: each gives what the plain model gives in one process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

import hecate
from hecate.examples.adafactor import ShardedAdafactor
from tests.adapters.parity import BF16_TOLERANCE
from tests.adapters.ways import CONFIG, Way, by_torch, compare_way, loss_of, on_gpt, one_by_one
from tests.workers import Groups

REMATERIALIZE = replace(CONFIG, rematerialize=True)
REPLICATE = replace(CONFIG, dense="replicate")
EVERY_STEP = replace(CONFIG, reshard_interval=1)
EVERY_STEP_REPLICATE = replace(REPLICATE, reshard_interval=1)
BY_LAYER = replace(CONFIG, pools="layer")


# Passes.


def with_no_sync(engine: hecate.FSSDP | None, model: Callable[..., Any], batches: list[Tensor], scale: float) -> Tensor:
    """The dense part's gradients are reduced in the last backward pass only."""
    assert engine is not None
    losses = [loss_of(model, batches[0])]
    with engine.no_sync():
        (losses[0] * scale).backward()
        for tokens in batches[1:-1]:
            losses.append(loss_of(model, tokens))
            (losses[-1] * scale).backward()
    losses.append(loss_of(model, batches[-1]))
    (losses[-1] * scale).backward()
    return torch.stack([loss.detach() for loss in losses]).mean()


def in_flight(engine: hecate.FSSDP | None, model: Callable[..., Any], batches: list[Tensor], scale: float) -> Tensor:
    """All forward passes, then their backward passes, the latest first."""
    losses = [loss_of(model, tokens) for tokens in batches]
    for loss in reversed(losses):
        (loss * scale).backward()
    return torch.stack([loss.detach() for loss in losses]).mean()


def in_flight_in_order(
    engine: hecate.FSSDP | None, model: Callable[..., Any], batches: list[Tensor], scale: float
) -> Tensor:
    """All forward passes, then their backward passes, the first one first."""
    losses = [loss_of(model, tokens) for tokens in batches]
    for loss in losses:
        (loss * scale).backward()
    return torch.stack([loss.detach() for loss in losses]).mean()


def in_one_backward(
    engine: hecate.FSSDP | None, model: Callable[..., Any], batches: list[Tensor], scale: float
) -> Tensor:
    losses = torch.stack([loss_of(model, tokens) for tokens in batches])
    (losses.sum() * scale).backward()
    return losses.detach().mean()


def with_evaluation(
    engine: hecate.FSSDP | None, model: Callable[..., Any], batches: list[Tensor], scale: float
) -> Tensor:
    """Between forward and backward pass of each micro-batch; its loss is added. It changes no statistics."""
    losses = []
    for tokens in batches:
        loss, before = loss_of(model, tokens), counts(engine)
        with torch.no_grad():
            evaluated = loss_of(model, tokens.flip(0))
        assert not evaluated.requires_grad
        assert counts(engine) == before
        (loss * scale).backward()
        losses.append(loss.detach() + evaluated)
    return torch.stack(losses).mean()


def counts(engine: hecate.FSSDP | None) -> list[Any]:
    return [] if engine is None else [layer["counts"].tolist() for layer in engine.stats()["layers"]]


def all_under_autocast(
    engine: hecate.FSSDP | None, model: Callable[..., Any], batches: list[Tensor], scale: float
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return one_by_one(engine, model, batches, scale)


# What is done to the model.


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def checkpointed_reentrant(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model.train()


def in_bf16(model: nn.Module) -> nn.Module:
    return model.bfloat16()


def train_only(model: nn.Module, wanted: Callable[[str], bool]) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(wanted(name))
    return model


def frozen_experts(model: nn.Module) -> nn.Module:
    return train_only(model, lambda name: ".experts." not in name)


def frozen_trunk(model: nn.Module) -> nn.Module:
    return train_only(model, lambda name: ".experts." in name)


def frozen_down(model: nn.Module) -> nn.Module:
    """One of the weights of each expert."""
    return train_only(model, lambda name: not name.endswith("experts.down"))


def frozen_trunk_checkpointed(model: nn.Module) -> nn.Module:
    return checkpointed(frozen_trunk(model))


def frozen_router(model: nn.Module) -> nn.Module:
    return train_only(model, lambda name: "mlp.gate." not in name)


def jittered(model: nn.Module) -> nn.Module:
    """Routers see their inputs times noise, which is drawn again in a recomputation."""
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_pre_hook(jitter)
    return checkpointed(model)


def jitter(router: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * torch.empty_like(args[0]).uniform_(0.9, 1.1),)


def frozen_first_layer(model: nn.Module) -> nn.Module:
    return train_only(model, lambda name: "layers.0." not in name and "embed" not in name)


def under_autocast(model: nn.Module) -> Callable[..., Any]:
    return torch.autocast("cpu", torch.bfloat16)(model)


def compiled(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="aot_eager")


# Optimizers.


def adamw_foreach(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, foreach=True)


def adamw_fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-3, eps=1e-4, fused=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def in_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Groups by name: experts have a lower learning rate, vectors no decay. Pool names contain the kind of weight."""
    experts, vectors, others = [], [], []
    for name, p in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            vectors.append(p)
        elif name.startswith("hecate_pool_") or ".experts." in name:
            experts.append(p)
        else:
            others.append(p)
    groups = [{"params": experts, "lr": 1e-4}, {"params": vectors, "weight_decay": 0.0}, {"params": others}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, eps=1e-4)


def by_layer(model: nn.Module) -> torch.optim.Optimizer:
    """Later layers have a higher learning rate, experts included: layer i has the parameters of pool i."""
    rates: dict[str, list[nn.Parameter]] = {"0": [], "1": [], "": []}
    for name, p in model.named_parameters():
        match = re.search(r"layers\.(\d)\.|hecate_pool_(\d)_", name)
        rates["" if match is None else match[match.lastindex or 0]].append(p)
    assert all(rates.values())
    return torch.optim.AdamW([{"params": p, "lr": 1e-3 * (1 + i)} for i, p in enumerate(rates.values())], eps=1e-4)


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return ShardedAdafactor(model.parameters(), lr=1e-3)


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


def warm_up(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: (step + 1) / 3)


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """It changes momentum, too."""
    return OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)


IN_BF16: Any = {"steps": 1, "tolerance": BF16_TOLERANCE}

EVALUATED: Any = {"passes": with_evaluation, "plain_passes": with_evaluation}
CLIPPED: Any = {"clip": by_torch, "steps": 4}

GROUPED: Any = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "num_hidden_layers": 3}
SHAPES = {
    "tied-top-1": Way("gpt_oss", {"tie_word_embeddings": True, "num_experts_per_tok": 1}, steps=2),
    "groups-of-experts": Way("deepseek_v3", {**GROUPED, "routed_scaling_factor": 2.5}, steps=2),
    "one-layer-one-expert": Way(
        "mixtral", {"num_hidden_layers": 1, "num_local_experts": 1, "num_experts_per_tok": 1}, steps=2
    ),
    "all-experts": Way("olmoe", {"num_experts_per_tok": 8}, steps=2),
}
"""Configurations of listed models that differ from those of the parity tests."""

WAYS = SHAPES | {
    "accumulation": Way(micro_batches=3),
    "no_sync": Way(micro_batches=3, passes=with_no_sync),
    "no_sync-replicate": Way(micro_batches=3, passes=with_no_sync, config=REPLICATE),
    "checkpointing": Way(micro_batches=2, prepare=checkpointed, config=REMATERIALIZE),
    "checkpointing-reentrant": Way(micro_batches=2, prepare=checkpointed_reentrant),
    "checkpointing-in-flight": Way(micro_batches=2, prepare=checkpointed, passes=in_flight),
    "in-flight": Way(micro_batches=3, passes=in_flight, config=REMATERIALIZE),
    "in-one-backward": Way(micro_batches=2, passes=in_one_backward, config=REPLICATE),
    "evaluation-in-between": Way(micro_batches=2, passes=with_evaluation, plain_passes=with_evaluation),
    "autocast": Way(wrap=under_autocast, plain_wrap=under_autocast, micro_batches=2),
    "autocast-over-all-passes": Way(passes=all_under_autocast, plain_wrap=under_autocast, micro_batches=2),
    "autocast-checkpointing": Way(wrap=under_autocast, plain_wrap=under_autocast, prepare=checkpointed),
    "bf16-model": Way(prepare=in_bf16, **IN_BF16),
    "float32-router": Way("deepseek_v3", {"dtype": torch.bfloat16}, micro_batches=3, passes=with_no_sync, **IN_BF16),
    "float32-router-checkpointing": Way("deepseek_v3", {"dtype": torch.bfloat16}, prepare=checkpointed, **IN_BF16),
    "frozen-experts": Way(prepare=frozen_experts, optimizer=adamw_fused),
    "frozen-trunk": Way(prepare=frozen_trunk, optimizer=adamw_fused, micro_batches=2),
    "frozen-trunk-replicate": Way(prepare=frozen_trunk, config=REPLICATE, optimizer=adamw_fused),
    "frozen-trunk-checkpointing": Way(prepare=frozen_trunk_checkpointed, optimizer=adamw_fused),
    "frozen-router": Way(prepare=frozen_router, optimizer=adamw_fused),
    "jitter": Way(prepare=jittered, micro_batches=2),
    "frozen-first-layer": Way(prepare=frozen_first_layer, optimizer=adamw_fused),
    "compile": Way(wrap=compiled, steps=2),
    "adamw-foreach": Way(optimizer=adamw_foreach),
    "adamw-fused": Way(optimizer=adamw_fused),
    "sgd-momentum": Way(optimizer=sgd),
    "groups": Way(model_type="gpt_oss", optimizer=in_groups),
    "groups-by-layer": Way(config=BY_LAYER, optimizer=by_layer),
    "adafactor": Way(optimizer=adafactor),
    "adafactor-replicate": Way(config=REPLICATE, optimizer=adafactor),
    "warm-up": Way(scheduler=warm_up),
    "one-cycle": Way(scheduler=one_cycle),
}
GPT_WAYS = {
    "evaluation": Way(**EVALUATED),
    "evaluation-rematerialize": Way(config=REMATERIALIZE, **EVALUATED),
    "evaluation-checkpointing": Way(prepare=checkpointed, **EVALUATED),
    "evaluation-checkpointing-rematerialize": Way(prepare=checkpointed, config=REMATERIALIZE, **EVALUATED),
    "in-flight": Way(micro_batches=2, prepare=checkpointed, passes=in_flight),
    "in-flight-rematerialize": Way(micro_batches=2, prepare=checkpointed, passes=in_flight, config=REMATERIALIZE),
    "in-flight-in-order": Way(micro_batches=2, prepare=checkpointed, passes=in_flight_in_order),
    "in-flight-in-order-rematerialize": Way(
        micro_batches=2, prepare=checkpointed, passes=in_flight_in_order, config=REMATERIALIZE
    ),
    "frozen-experts": Way(prepare=frozen_experts, optimizer=adamw_fused),
    "frozen-experts-replicate": Way(prepare=frozen_experts, optimizer=adamw_fused, config=REPLICATE),
    "frozen-trunk": Way(prepare=frozen_trunk, optimizer=adamw_fused),
    "frozen-trunk-replicate": Way(prepare=frozen_trunk, optimizer=adamw_fused, config=REPLICATE),
    "frozen-down": Way(prepare=frozen_down, optimizer=adamw_fused),
    "frozen-down-replicate": Way(prepare=frozen_down, optimizer=adamw_fused, config=REPLICATE),
    "adamw-fused": Way(optimizer=adamw_fused, config=EVERY_STEP, **CLIPPED),
    "adamw-foreach-replicate": Way(optimizer=adamw_foreach, config=EVERY_STEP_REPLICATE, keep_zeros=True, **CLIPPED),
    "sgd-momentum": Way(optimizer=sgd, config=EVERY_STEP, keep_zeros=True, **CLIPPED),
    "sgd-momentum-replicate": Way(optimizer=sgd, config=EVERY_STEP_REPLICATE, **CLIPPED),
}
WAYS |= {f"gpt-{name}": on_gpt(way) for name, way in GPT_WAYS.items()}


@pytest.mark.parametrize("name", WAYS)
def test_trains_as_in_one_process(groups: Groups, name: str) -> None:
    groups(2).run(compare_way, WAYS[name])
