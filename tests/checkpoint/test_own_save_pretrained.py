"""`model.save_pretrained`, as scripts and trainers call it, under FSSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hecate
from tests.adapters.tiny import tiny_model
from tests.checkpoint.runs import plain_model
from tests.workers import Groups

CONFIG = hecate.FSSDPConfig(reshard_interval=1, memory_slots=2)


def trained(model: nn.Module) -> hecate.FSSDP:
    engine = hecate.fully_shard(model, None, CONFIG)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(3):
        tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine


def saved(folder: str, size: str) -> dict[str, Tensor]:
    engine = trained(tiny_model("qwen3_moe"))
    main = not dist.is_initialized() or dist.get_rank() == 0
    engine.model.save_pretrained(folder, is_main_process=main, max_shard_size=size)
    return engine.full_state_dict()


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_from_pretrained_reads_it(groups: Groups, tmp_path: Path, world_size: int, size: str) -> None:
    state = saved(str(tmp_path), size) if world_size == 1 else groups(2).run(saved, str(tmp_path), size)[0]
    back = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name
    assert (len(list(tmp_path.glob("*.safetensors"))) > world_size) == (size == "20KB")


def saved_by_one(folder: str) -> dict[str, Tensor]:
    """With a state dict, the model's own method runs on the calling rank."""
    engine = trained(tiny_model("qwen3_moe"))
    state = engine.full_state_dict()
    if dist.get_rank() == 0:
        engine.model.save_pretrained(folder, state_dict=dict(state), variant="best")
    dist.barrier()
    return state


def test_with_a_state_dict_it_stays_the_model_s_own(groups: Groups, tmp_path: Path) -> None:
    state = groups(2).run(saved_by_one, str(tmp_path))[0]
    back = AutoModelForCausalLM.from_pretrained(tmp_path, variant="best").state_dict()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def adapters_saved(folder: str) -> None:
    """Saves only the adapters, gathered from all ranks."""
    torch.manual_seed(5)
    base = tiny_model("qwen3_moe")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    engine = trained(get_peft_model(base, config))
    state = engine.full_state_dict()
    engine.model.save_pretrained(folder)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_model("qwen3_moe"), folder))
    expected = get_peft_model_state_dict(engine.model, state_dict=state)
    assert loaded.keys() == expected.keys()
    assert len(loaded) > 0
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_adapters(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(adapters_saved, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"), [("push_to_hub", True), ("variant", "best"), ("save_original_format", False), ("other", 1)]
)
def test_what_the_engine_does_not_do_is_named(tmp_path: Path, name: str, value: object) -> None:
    model = hecate.fully_shard(tiny_model("qwen3_moe")).model
    with pytest.raises(ValueError, match=rf"save_pretrained\({name}={value!r}\): not supported under hecate"):
        model.save_pretrained(tmp_path / "saved", **{name: value})
    assert not (tmp_path / "saved").exists()
    with pytest.raises(TypeError, match="save_directory"):
        model.save_pretrained()


def of_another_library(folder: str) -> None:
    model = plain_model()
    called: list[str] = []
    model.save_pretrained = called.append
    hecate.fully_shard(model)
    if not dist.is_initialized():
        model.save_pretrained(folder)
        assert called == [folder]
        return
    with pytest.raises(ValueError, match=r"save_pretrained would write what this rank has; call engine\.save"):
        model.save_pretrained(folder)
    assert not called


def test_other_libraries(groups: Groups, tmp_path: Path) -> None:
    of_another_library(str(tmp_path))
    groups(2).run(of_another_library, str(tmp_path))
