"""Models that read images train as in one process: with images on all ranks, on some or on none."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import pytest
import torch.distributed as dist
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hecate
from tests.adapters.images import MODELS, batch_of, tiny_image_model
from tests.adapters.parity import CONFIG, adamw, close
from tests.adapters.ways import compare_gradients, error_of
from tests.runtime.reference import full_gradients
from tests.workers import Groups

STEPS = {"fsdp": ((0, 1), ()), "replicate": ((0, 1), (1,), ())}
"""Dense part -> ranks whose batches have images, step by step."""


def compare_with_plain(model_type: str, dense: Literal["fsdp", "replicate"]) -> None:
    plain = tiny_image_model(model_type)
    config = replace(CONFIG, dense=dense)
    engine = hecate.fully_shard(copy.deepcopy(plain), None, config)
    optimizer, plain_optimizer = adamw(engine.model), adamw(plain)
    rank, world = dist.get_rank(), dist.get_world_size()
    for step, with_images in enumerate(STEPS[dense]):
        engine.model(**batch_of(10 * step + rank, rank in with_images)).loss.backward()
        for r in range(world):
            (plain(**batch_of(10 * step + r, r in with_images)).loss / world).backward()
        compare_gradients(f"step {step}", full_gradients(engine), plain, 1e-5)
        for each in (optimizer, plain_optimizer):
            each.step()
            each.zero_grad()
        state = engine.full_state_dict()
        for name, value in plain.state_dict().items():
            close(f"step {step}: {name}", state[name], value)
    if dense == "fsdp":
        error = error_of(lambda: engine.model(**batch_of(rank, rank == 1)))
        assert "language_model.layers on ranks [0] and model.visual.blocks on ranks [1] come next" in error
        assert "give a batch without images one blank image" in error
    dist.barrier()


@pytest.mark.parametrize("dense", STEPS)
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(m, marks=[] if m == "qwen3_vl_moe" else pytest.mark.long) for m in MODELS if m in CONFIG_MAPPING],
)
def test_parity(groups: Groups, model_type: str, dense: str) -> None:
    groups(2).run(compare_with_plain, model_type, dense)
