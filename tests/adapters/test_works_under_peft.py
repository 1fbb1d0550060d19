"""LoRA through peft on the dense part: adapters train as in one process, and go into a folder of their own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import hecate
from tests.adapters.parity import batch, close, spread_router
from tests.adapters.tiny import tiny_model
from tests.adapters.ways import CONFIG, Way, compare_way, error_of, loss_of
from tests.workers import Groups


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1)
    return get_peft_model(model, config)


def with_lora_checkpointed(model: nn.Module) -> nn.Module:
    adapted = with_lora(model)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return adapted.train()


def adamw_of_adapters(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


@pytest.mark.parametrize("prepare", [with_lora, with_lora_checkpointed])
def test_adapters_train_as_in_one_process(groups: Groups, prepare) -> None:  # type: ignore[no-untyped-def]
    way = Way(prepare=prepare, optimizer=adamw_of_adapters, micro_batches=2)
    groups(2).run(compare_way, way)


def save_adapters(folder: str) -> None:
    """Trained adapters, saved by peft from the whole state, load on the plain base model."""
    base = spread_router(tiny_model("qwen3_moe"))
    engine = hecate.fully_shard(with_lora(copy.deepcopy(base)), None, CONFIG)
    optimizer = adamw_of_adapters(engine.model)
    loss_of(engine.model, batch(0, dist.get_rank())).backward()
    optimizer.step()
    state = engine.full_state_dict()
    if dist.get_rank() == 0:
        engine.model.save_pretrained(folder, state_dict=state)
        loaded = PeftModel.from_pretrained(base, folder)
        adapters = get_peft_model_state_dict(loaded)
        assert adapters
        for name, value in get_peft_model_state_dict(engine.model, state_dict=state).items():
            close(name, adapters[name], value)
        assert not any(".experts." in name for name in adapters)


def test_adapters_are_saved(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(save_adapters, str(tmp_path))


def test_adapters_on_experts_are_refused() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(tiny_model("qwen3_moe"), config)
    message = error_of(lambda: hecate.fully_shard(model))
    assert "mlp.experts.base_layer: ParamWrapper adapts its weights; adapters (LoRA) fit the dense part only" in message
