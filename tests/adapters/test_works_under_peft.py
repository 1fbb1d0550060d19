"""LoRA through peft: adapters train as in one process, and go into a folder of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

import hecate
from tests.adapters.parity import BF16_TOLERANCE, batch, close, spread_router
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


EXPERTS = LoraConfig(
    r=4,
    lora_alpha=12,
    target_modules=["q_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    init_lora_weights=False,
)


def with_expert_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return get_peft_model(model, copy.deepcopy(EXPERTS))


def with_all_linear(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def with_expert_lora_on_bfloat16(model: nn.Module) -> nn.Module:
    """Peft makes the adapters float32."""
    return with_expert_lora(model.to(torch.bfloat16))


@pytest.mark.parametrize(
    "way",
    [
        Way(prepare=with_expert_lora, optimizer=adamw_of_adapters, micro_batches=2),
        Way(prepare=with_all_linear, optimizer=adamw_of_adapters),
        Way(model_type="gpt_oss", prepare=with_expert_lora, optimizer=adamw_of_adapters),
        Way(prepare=with_expert_lora_on_bfloat16, optimizer=adamw_of_adapters, steps=1, tolerance=BF16_TOLERANCE),
    ],
    ids=["qwen3_moe", "all-linear", "gpt_oss", "bfloat16"],
)
def test_adapters_of_experts_train_as_in_one_process(groups: Groups, way: Way) -> None:
    groups(2).run(compare_way, way)


def save_and_load_expert_adapters(folder: Path) -> None:
    base = spread_router(tiny_model("qwen3_moe"))
    engine = hecate.fully_shard(with_expert_lora(copy.deepcopy(base)), None, CONFIG)
    optimizer = adamw_of_adapters(engine.model)
    for step in range(3):  # experts change owners
        loss_of(engine.model, batch(step, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = engine.full_state_dict()
    engine.save(folder / "checkpoint", optimizer)
    engine.model.save_pretrained(str(folder / "adapters"))

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "adapters"), is_trainable=True)
    wanted = get_peft_model_state_dict(loaded)
    assert sum(".experts." in name for name in wanted) == 8  # A and B of two weights in two layers
    for name, value in get_peft_model_state_dict(engine.model, state_dict=state).items():
        assert torch.equal(wanted[name], value), name

    again = hecate.fully_shard(loaded, None, CONFIG)
    check_equal(again.full_state_dict(), state)

    other = hecate.fully_shard(with_expert_lora(spread_router(tiny_model("qwen3_moe", seed=9))), None, CONFIG)
    other.load(folder / "checkpoint", adamw_of_adapters(other.model))
    check_equal(other.full_state_dict(), state)
    zeros = {NAME: torch.zeros_like(state[NAME])}
    other.model.load_state_dict(zeros, strict=False)  # in peft's shape
    check_equal(other.full_state_dict(), state | zeros)
    other.model.load_state_dict(engine.model.state_dict())  # stacked
    check_equal(other.full_state_dict(), state)


NAME = "base_model.model.model.layers.1.mlp.experts.lora_B.default.weight"


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_expert_adapters_are_saved_and_loaded(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(save_and_load_expert_adapters, tmp_path)


def merge_and_disable() -> None:
    """The outputs and weights of peft in one process, with adapters disabled, merged and unmerged."""
    plain = with_expert_lora(spread_router(tiny_model("gpt_oss")))
    engine = hecate.fully_shard(copy.deepcopy(plain), None, CONFIG)
    kept = {name: value.clone() for name, value in plain.state_dict().items()}
    tokens = batch(0, 0)

    def compare(what: str) -> Tensor:
        state = engine.full_state_dict()
        for name, value in plain.state_dict().items():
            close(f"{what}: {name}", state[name], value)
        found: Tensor = engine.model(input_ids=tokens).logits
        close(f"{what}: logits", found, plain(input_ids=tokens).logits)
        return found

    with torch.no_grad():
        before = compare("with adapters")
        with engine.model.disable_adapter(), plain.disable_adapter():
            assert not any(p.requires_grad for p in engine.model.parameters())
            assert not torch.allclose(compare("without"), before)
        assert sum(p.requires_grad for p in engine.model.parameters()) == 2 * (2 + 2)  # A and B: q_proj; in pools
        engine.model.merge_adapter()
        plain.merge_adapter()
        compare("merged")
        assert not torch.equal(plain.state_dict()[MERGED], kept[MERGED])
        engine.model.unmerge_adapter()
        plain.unmerge_adapter()
        compare("unmerged")
    names = ["default"] * len(tokens)
    assert "mixed adapter batches" in error_of(lambda: engine.model.eval()(input_ids=tokens, adapter_names=names))
    assert "'default' cannot be deleted" in error_of(lambda: wrappers(engine.model)[0].delete_adapter("default"))
    assert "adapters cannot be unloaded" in error_of(engine.model.merge_and_unload)


MERGED = "base_model.model.model.layers.0.mlp.experts.base_layer.base_layer.down_proj"


def test_adapters_of_experts_are_merged_and_disabled(groups: Groups) -> None:
    groups(2).run(merge_and_disable)


def refused(prepare: Callable[[PeftModel], object] = lambda model: None, **changes: Any) -> str:
    config = LoraConfig(r=2, target_modules=["q_proj"], **changes)
    model = get_peft_model(tiny_model("gpt_oss"), config)
    prepare(model)
    return error_of(lambda: hecate.fully_shard(model))


def test_adapters_that_would_differ_are_refused() -> None:
    down, bias = ["experts.down_proj"], ["experts.down_proj_bias"]
    assert "down_proj_bias, which is (8, 32); must be a stack of matrices" in refused(target_parameters=bias)
    assert "down_proj is merged; call unmerge_adapter" in refused(
        lambda model: model.merge_adapter(), target_parameters=down
    )
    with_dropout = refused(
        lambda m: [w.lora_dropout.update({"default": nn.Dropout(0.1)}) for w in wrappers(m)], target_parameters=down
    )
    assert "down_proj has dropout; on experts only plain LoRA is supported" in with_dropout
    half = refused(lambda m: [w.lora_A.half() and w.lora_B.half() for w in wrappers(m)], target_parameters=down)
    assert "dtype torch.float16 needs a loss scaler" in half
    for wrapper in wrappers(model := get_peft_model(tiny_model("gpt_oss"), LoraConfig(target_parameters=down))):
        wrapper.__class__ = type("OtherTuner", (type(wrapper),), {})
    assert "OtherTuner adapts experts; of peft's adapters only LoRA" in error_of(lambda: hecate.fully_shard(model))


def wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]


def test_sonicmoe_is_refused_because_it_would_leave_adapters_out() -> None:
    model = get_peft_model(tiny_model("qwen3_moe", dtype=torch.bfloat16), LoraConfig(r=2, target_modules="all-linear"))
    message = error_of(lambda: hecate.fully_shard(model, None, hecate.FSSDPConfig(expert_gemm="sonicmoe")))
    assert 'expert_gemm="sonicmoe": base_model.model.model.layers.0.mlp.experts' in message
    assert "is no plain gated MLP of transformers" in message


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_initial_values_of_adapters_are_not_drawn_by_the_models_rule(targets: Any) -> None:
    engine = hecate.fully_shard(get_peft_model(tiny_model("qwen3_moe"), LoraConfig(r=2, target_modules=targets)))
    assert "has adapters of peft, whose first values are not the model's" in error_of(lambda: engine.init_weights(0))
    engine.init_weights(0, rule=lambda module: [p.zero_() for p in module.parameters(recurse=False)])


def on_meta() -> hecate.FSSDP:
    with torch.device("meta"):
        model = tiny_model("qwen3_moe")
    config = copy.deepcopy(EXPERTS)
    config.init_lora_weights = True
    return hecate.fully_shard(get_peft_model(model, config), None, CONFIG)


def load_on_the_meta_device(folder: Path) -> None:
    """A base model without values and adapters without values: both load, and adapters without a folder begin at 0."""
    base = tiny_model("qwen3_moe", seed=3)
    if dist.get_rank() == 0:
        base.save_pretrained(folder / "base")
    dist.barrier()
    engine = on_meta()
    engine.load_pretrained(folder / "base")
    state = engine.full_state_dict()
    theirs = {name for name in state if ".lora_" in name}
    for name in theirs:
        assert bool(state[name].any()) == (".lora_A." in name), name
        assert float(state[name].abs().max()) <= state[name].shape[-1] ** -0.5
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", ""): n for n in state.keys() - theirs}
    assert plain.keys() == base.state_dict().keys()
    for name, value in base.state_dict().items():
        assert torch.equal(state[plain[name]], value), name
    close("logits", engine.model(input_ids=batch(0, 0)).logits, base(input_ids=batch(0, 0)).logits)

    optimizer = adamw_of_adapters(engine.model)
    for step in range(3):  # experts change owners
        loss_of(engine.model, batch(step, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.model.save_pretrained(str(folder / "adapters"))
    dist.barrier()
    other = on_meta()
    other.load_pretrained(folder / "adapters")
    assert "have no values yet" in error_of(lambda: other.model(input_ids=batch(0, 0)))
    other.load_pretrained(folder / "base")
    check_equal(other.full_state_dict(), engine.full_state_dict())
    plain_engine = hecate.fully_shard(tiny_model("qwen3_moe"), None, CONFIG)
    assert "adapters of peft, and the model has none" in error_of(
        lambda: plain_engine.load_pretrained(folder / "adapters")
    )


def test_base_model_and_adapters_load_on_the_meta_device(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(load_on_the_meta_device, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian' asks for others than the default True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save.default.weight have no values; load a folder of peft's"),
    ],
)
def test_adapters_whose_first_values_are_not_the_default(tmp_path: Path, changes: Any, message: str) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    with torch.device("meta"):
        model = tiny_model("qwen3_moe")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **changes))
    engine = hecate.fully_shard(adapted)
    assert message in error_of(lambda: engine.load_pretrained(tmp_path))
