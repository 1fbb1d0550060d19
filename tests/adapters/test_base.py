"""What an adapter accepts as an MoE layer, and its error for one that does not fit."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hecate
from hecate.models.gpt import GPTMoE
from tests.adapters.tiny import tiny_model
from tests.runtime.reference import TINY


def test_tied_experts_are_refused() -> None:
    model = GPTMoE(TINY)
    model.blocks[2].moe.experts.up = model.blocks[0].moe.experts.up
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.experts\.up and blocks\.2\.moe\.experts\.up are one tied"):
        hecate.fully_shard(model)


def test_one_module_at_two_places_is_refused() -> None:
    model = GPTMoE(TINY)
    model.blocks[2].moe = model.blocks[0].moe
    with pytest.raises(ValueError, match="are one tied parameter; experts must not be tied"):
        hecate.fully_shard(model)


def test_parameter_of_no_expert_is_refused() -> None:
    model = GPTMoE(TINY)
    model.blocks[0].moe.experts.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.experts: parameters \['scale'\] belong to no expert"):
        hecate.fully_shard(model)


def test_submodules_and_attributes_of_experts_stay() -> None:
    model = GPTMoE(TINY)
    experts = model.blocks[0].moe.experts
    experts.norm = nn.LayerNorm(TINY.d_model)
    plain = type(experts).expert_mlp
    experts.expert_mlp = lambda x, groups, weights: experts.norm(plain(x, groups, weights))  # type: ignore[method-assign]
    engine = hecate.fully_shard(model)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
    assert model.blocks[0].moe.experts.norm.weight.grad is not None
    assert model.blocks[0].moe.experts.num_experts == TINY.num_experts
    assert "blocks.0.moe.experts.norm.weight" in engine.full_state_dict()
    assert "FSSDPExperts(num_experts=8, up[32, 16], down[16, 32]" in repr(model)


def test_weights_that_the_interface_promises_but_lacks() -> None:
    model = tiny_model("mixtral")
    del model.model.layers[0].mlp.experts.down_proj
    with pytest.raises(
        ValueError, match=r"MixtralExperts\): has no parameter down_proj; transformers' experts interface"
    ):
        hecate.fully_shard(model)


def test_experts_of_an_early_transformers_5() -> None:
    """Its interface did not say yet that experts have a gate and no norm behind them."""
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        del layer.mlp.experts.has_gate, layer.mlp.experts.has_post_expert_norm
    hecate.fully_shard(model)
    tokens = torch.arange(3, 11).unsqueeze(0)
    torch.testing.assert_close(model(tokens).logits, tiny_model("mixtral")(tokens).logits)


def test_a_router_that_weights_all_experts_is_refused() -> None:
    """As that of phimoe in transformers 5.0; later ones have `top_k`."""
    model = GPTMoE(TINY)
    gate = model.blocks[1].moe.gate
    gate.__class__ = type("PhimoeTopKRouter", (type(gate),), {})
    gate.top_k = 2
    hecate.fully_shard(copy.deepcopy(model))
    del gate.top_k
    expected = r"blocks\.1\.moe\.experts: its router gate \(PhimoeTopKRouter\) has no top_k"
    with pytest.raises(ValueError, match=expected):
        hecate.fully_shard(model)


def test_what_an_early_transformers_5_leaves_untied_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tiny_model("ernie4_5_moe")
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    engine = hecate.fully_shard(nn.ModuleDict({"model": model}))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    engine.close()


def test_two_flags_of_the_interface_make_no_experts() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].has_bias, model[0].is_transposed = True, False
    with pytest.raises(ValueError, match="Sequential has no MoE layer that fits"):
        hecate.fully_shard(model)


class Quantized(Tensor):
    """As torchao's: the dtype is that of the values it stands for."""

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return [], None


def test_quantized_experts_are_refused() -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"experts\.down_proj: dtype torch\.float8_e4m3fn is quantized"):
        hecate.fully_shard(model)
    experts.down_proj = nn.Parameter(torch.zeros_like(experts.down_proj).float().as_subclass(Quantized))
    with pytest.raises(ValueError, match=r"experts\.down_proj is a Quantized; must be a plain tensor"):
        hecate.fully_shard(model)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("gone", None, "is not there"),
        ("fixed", torch.ones(8, 16, 32), r"is a Tensor of shape \(8, 16, 32\)"),
        ("scale", nn.Parameter(torch.ones(())), r"is a Parameter of shape \(\)"),
        ("fixed.weight", None, "is not there"),
    ],
)
def test_names_of_what_is_no_stacked_parameter(name: str, value: Tensor | None, what: str) -> None:
    model = GPTMoE(TINY)
    experts: Any = model.blocks[1].moe.experts
    if isinstance(value, nn.Parameter):
        experts.register_parameter(name, value)
    elif value is not None:
        experts.register_buffer(name, value)
    experts.expert_weights = ("up", "down", name)
    message = (
        rf"blocks\.1\.moe\.experts \(\w+\): the stacked weight '{name}' {what}; must be an nn\.Parameter \[experts"
    )
    with pytest.raises(ValueError, match=message):
        hecate.fully_shard(model)


def _doubled(experts: Any, *args: Tensor) -> Tensor:
    return 2 * type(experts).forward(experts, *args)


def test_experts_with_a_forward_pass_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a subclass, in transformers' class, or in one object: FSSDP would train without what it adds."""
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    own = type(experts)
    experts.__class__ = type("ScaledExperts", (own,), {"forward": lambda self, *args: 2 * own.forward(self, *args)})
    refused = r"layers\.1\.mlp\.experts: the forward pass of ScaledExperts is .*<lambda>, not that of transformers'"
    with pytest.raises(ValueError, match=refused):
        hecate.fully_shard(model)
    experts.__class__ = type("OtherGate", (own,), {"_apply_gate": lambda self, x: x.chunk(2, dim=-1)[0].relu()})
    tokens = torch.arange(3, 11).unsqueeze(0)
    expected = model(tokens).logits
    experts.forward = _doubled.__get__(experts)
    with pytest.raises(ValueError, match=r"the forward pass of this OtherGate was replaced by _doubled"):
        hecate.fully_shard(model)
    del experts.forward
    monkeypatch.setattr(own, "forward", _doubled)
    with pytest.raises(ValueError, match=r"the forward pass of MixtralExperts is _doubled, not that of"):
        hecate.fully_shard(model)
    monkeypatch.undo()
    hecate.fully_shard(model)
    torch.testing.assert_close(model(tokens).logits, expected)


class DenseExperts(nn.Module):
    """A module that looks like experts to a reader, but not to an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up.sum(0)


def test_look_alikes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"what looks like one is 0 \(DenseExperts with up\[4, 8, 8\], which lacks has_gate"
    ):
        hecate.fully_shard(nn.Sequential(DenseExperts()))


def test_step3p7_without_the_decorator() -> None:
    """Its experts follow the interface, but have none of its attributes."""
    modeling = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    config = SimpleNamespace(num_local_experts=4, hidden_size=8, moe_intermediate_size=6, hidden_act="silu")
    model = nn.ModuleDict({"experts": modeling.Step3p7Experts(config, swiglu_limit=0.5)}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.forward = lambda *args: model["experts"](*args)  # type: ignore[method-assign]
    plain = copy.deepcopy(model["experts"])
    engine = hecate.fully_shard(model)
    x = torch.randn(9, 8, dtype=torch.float64)
    weights, index = torch.rand(9, 4, dtype=torch.float64).topk(2)
    ours, expected = model(x, index, weights), plain(x, index, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(engine.pools[0].parameters["gate_up_proj"].grad, plain.gate_up_proj.grad)


def test_experts_that_do_not_fit_are_named_with_what_they_lack() -> None:
    modeling = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    config = SimpleNamespace(
        n_routed_experts=4, zero_expert_num=2, hidden_size=8, expert_ffn_hidden_size=6, hidden_act="silu"
    )
    model = nn.ModuleDict({"experts": modeling.LongcatFlashExperts(config)})
    lacks = r"experts \(LongcatFlashExperts with gate_up_proj\[6, 12, 8\], down_proj\[4, 8, 6\], which lacks has_gate"
    with pytest.raises(ValueError, match=lacks):
        hecate.fully_shard(model)
