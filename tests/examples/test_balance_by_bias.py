"""Biases that follow loads are the same on two devices as in one process, and so is training with them."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.examples.balance_by_bias import update_biases
from tests.adapters.parity import CONFIG, adamw, batch, close, spread_router
from tests.adapters.tiny import tiny_model
from tests.adapters.ways import loss_of
from tests.workers import Groups

SPEED = 0.05
"""So fast that a bias soon changes what its router chooses."""
MICRO_BATCHES = 2
"""A step's; their loads are added up."""


def _counted(model: nn.Module) -> dict[nn.Module, np.ndarray]:
    """Tokens of each expert of a plain model, by router, from its calls of the experts."""
    loads: dict[nn.Module, np.ndarray] = {}

    def count(layer: nn.Module, index: Tensor) -> None:
        counts = np.bincount(index.flatten().numpy(), minlength=8)
        loads[layer.gate] = loads.get(layer.gate, 0) + counts

    for layer in model.modules():
        if hasattr(layer, "gate") and hasattr(layer, "experts"):
            layer.experts.register_forward_pre_hook(lambda module, args, layer=layer: count(layer, args[1]))
    return loads


def _micro_batches(step: int, rank: int) -> list[Tensor]:
    return [batch(10 * step + i, rank) for i in range(MICRO_BATCHES)]


def _compare(model_type: str) -> None:
    plain = spread_router(tiny_model(model_type))
    engine = hecate.fully_shard(copy.deepcopy(plain), None, CONFIG)
    loads = _counted(plain)
    optimizer, plain_optimizer = adamw(engine.model), adamw(plain)
    world = dist.get_world_size()
    for step in range(3):
        for tokens in _micro_batches(step, dist.get_rank()):
            (loss_of(engine.model, tokens) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_biases(engine, SPEED)
        for tokens in (tokens for rank in range(world) for tokens in _micro_batches(step, rank)):
            (loss_of(plain, tokens) / world / MICRO_BATCHES).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        for gate, load in loads.items():
            gate.e_score_correction_bias += SPEED * torch.from_numpy(np.sign(load.mean() - load))
        loads.clear()
    state = engine.full_state_dict()
    assert any(value.any() for name, value in state.items() if name.endswith("e_score_correction_bias"))
    for name, value in plain.state_dict().items():
        close(name, state[name], value)


def test_biases_follow_the_loads_of_all_ranks(groups: Groups) -> None:
    for model_type in ("deepseek_v3", "glm4_moe"):
        groups(2).run(_compare, model_type)
