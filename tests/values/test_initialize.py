"""Models built on the meta device: the same initial values on any number of devices, and only what is owned."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.models.gpt import GPTMoE
from tests.adapters.tiny import tiny_model
from tests.runtime.reference import TINY
from tests.workers import Groups

ARCHITECTURES = ("mixtral", "gpt_oss", "qwen3_moe", "qwen3_next", "deepseek_v3", "granitemoe", "nemotron_h", "afmoe")


def initialized(model_type: str, dense: str, meta: bool, seed: int = 7) -> dict[str, Tensor]:
    """State of a model after `init_weights`, with its non-persistent buffers."""
    with torch.device("meta" if meta else "cpu"):
        model = tiny_model(model_type)
    engine = hecate.fully_shard(model, None, hecate.FSSDPConfig(dense=dense))  # type: ignore[arg-type]
    engine.init_weights(seed)
    tokens = torch.arange(3, 11).unsqueeze(0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return engine.full_state_dict() | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_same_values_on_any_number_of_devices(groups: Groups, model_type: str, dense: str) -> None:
    alone = initialized(model_type, "fsdp", meta=False)
    for world_size in (2, 3) if dense == "fsdp" else (2,):
        for state in groups(world_size).run(initialized, model_type, dense, True):
            assert state.keys() == alone.keys()
            for name, value in alone.items():
                assert torch.equal(state[name], value), name


def test_values_follow_the_model_s_rules() -> None:
    state = initialized("mixtral", "fsdp", meta=True)
    experts = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert experts.std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(experts, state["model.layers.0.mlp.experts.gate_up_proj"])
    assert torch.equal(state["model.norm.weight"], torch.ones(32))
    assert not torch.equal(
        experts, initialized("mixtral", "fsdp", True, seed=8)["model.layers.1.mlp.experts.gate_up_proj"]
    )


def sharded_gpt() -> dict[str, Tensor]:
    with torch.device("meta"):
        model = GPTMoE(TINY)
    engine = hecate.fully_shard(model)
    engine.init_weights(3)
    return engine.full_state_dict()


def test_our_models_have_the_same_values_before_and_after_sharding(groups: Groups) -> None:
    plain = GPTMoE(TINY)
    plain.init_weights(3)
    for state in groups(3).run(sharded_gpt):
        for name, value in plain.state_dict().items():
            assert torch.equal(state[name], value), name


def test_forward_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = GPTMoE(TINY)
    engine = hecate.fully_shard(model)
    for use in (lambda: model(torch.zeros(1, 4, dtype=torch.int64)), engine.full_state_dict):
        with pytest.raises(RuntimeError, match=r"no values yet; call init_weights, load_pretrained or load first"):
            use()


class Scaled(nn.Module):
    """A model with a parameter that nothing initializes, and one that a rule of its own does."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPTMoE(TINY)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens).logits * self.scale.sum()


def test_parameter_that_no_rule_fills_is_named() -> None:
    with torch.device("meta"):
        model = Scaled()
    engine = hecate.fully_shard(model)
    with pytest.raises(ValueError, match="init_weights: no rule fills scale;"):
        engine.init_weights(0)


def test_own_rule() -> None:
    def rule(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.uniform_(parameter, 1.0, 2.0)

    with torch.device("meta"):
        model = Scaled()
    engine = hecate.fully_shard(model)
    engine.init_weights(0, rule)
    assert all(value.min() >= 1.0 and value.max() <= 2.0 for value in engine.full_state_dict().values())


class PartlyReset(GPTMoE):
    """Its rule writes one row only of what its child's rule has filled."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.zeros_(self.tokens.weight[0])


def test_rule_that_writes_a_part_is_refused() -> None:
    with torch.device("meta"):
        model = PartlyReset(TINY)
    engine = hecate.fully_shard(model)
    with pytest.raises(ValueError, match=r"writes tokens\.weight in part"):
        engine.init_weights(0)


def test_tied_parameters_need_one_rule() -> None:
    with torch.device("meta"):
        model = GPTMoE(TINY)
        model.head.weight = model.tokens.weight
    engine = hecate.fully_shard(model)
    engine.init_weights(0)
    assert model.head.weight is model.tokens.weight


class WithBuffer(GPTMoE):
    """A buffer outside the state dict that no rule computes."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.register_buffer("mask", torch.ones(4), persistent=False)


def test_buffer_that_no_rule_computes_is_named() -> None:
    with torch.device("meta"):
        model = WithBuffer()
    with pytest.raises(ValueError, match="buffers mask are on the meta device and not in the state dict"):
        hecate.fully_shard(model)


def pool_bytes_and_embedding_rows() -> tuple[int, int, int]:
    with torch.device("meta"):
        model = tiny_model("mixtral")
    engine = hecate.fully_shard(model)
    embedding = model.get_parameter("model.embed_tokens.weight")
    slots = sum(p.to_local().shape[0] for pool in engine.pools for p in [pool.parameters["down_proj"]])
    return dist.get_rank(), slots, embedding.to_local().shape[0]


def test_every_device_allocates_what_it_owns(groups: Groups) -> None:
    for _, slots, rows in groups(2).run(pool_bytes_and_embedding_rows):
        assert (slots, rows) == (8, 32)
