"""SonicMoE in place of torch's products, with a stand-in that computes what transformers expects of the real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import sonicmoe as integration

import hecate
from hecate.adapters.transformers import interface_mlp
from hecate.ops.grouped import Groups
from hecate.ops.sonicmoe import check_sonicmoe
from tests.adapters.tiny import tiny_model
from tests.runtime.helpers import config, gpt

BF16 = torch.bfloat16


def routed(x: Tensor, scores: Tensor, token: Tensor, expert: Tensor, w1, b1, w2, b2, **how: Any):  # type: ignore[no-untyped-def]
    """What `moe_general_routing_inputs` computes: weights `[2 f, d, E]` and `[d, f, E]`; tokens ascend."""
    assert (how["E"], how["activation_type"], how["concat_layout"]) == (w1.shape[2], "swiglu", True)
    assert token.dtype == expert.dtype == torch.int32
    assert (token.diff() >= 0).all()
    out = torch.zeros_like(x)
    for i, (t, e) in enumerate(zip(token.tolist(), expert.tolist(), strict=True)):
        gate, up = (w1[..., e] @ x[t]).chunk(2)
        out = out.index_add(0, token[i : i + 1].long(), (scores[i] * (w2[..., e] @ (F.silu(gate) * up)))[None])
    return out, None


KERNEL = SimpleNamespace(activation_type_enum=SimpleNamespace(SWIGLU="swiglu"), moe_general_routing_inputs=routed)


@pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 0, 0)])
def test_equals_the_products_by_torch(sizes: tuple[int, ...]) -> None:
    module: Any = next(m for m in tiny_model("qwen3_moe").modules() if hasattr(m, "_apply_gate"))
    mlp, results = interface_mlp(module), []
    for gemm in ("torch", "sonicmoe"):
        weights = {n: p.detach()[:3].clone().requires_grad_() for n, p in module.named_parameters()}
        rows = torch.randn(sum(sizes), 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with mock.patch.object(integration, "load_sonicmoe_kernel", return_value=KERNEL):
            out = mlp(rows, Groups.of(sizes, rows.device, gemm=gemm), weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), [rows, *weights.values()])])
    torch.testing.assert_close(*results)


def test_by_name_it_is_there_or_nothing_is_changed() -> None:
    settings = config("balanced", expert_gemm="sonicmoe", param_dtype=BF16)
    with pytest.raises(ValueError, match=r'"sonicmoe": blocks.0.moe.experts is no plain gated MLP of transformers'):
        hecate.fully_shard(gpt(), None, settings)
    model = tiny_model("qwen3_moe")
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match=r'expert_gemm="sonicmoe": it needs CUDA, the experts are on cpu'):
        hecate.fully_shard(model, None, settings)
    with pytest.raises(ValueError, match=r"computes in torch.float32, must be torch.bfloat16"):
        hecate.fully_shard(model, None, config("balanced", expert_gemm="sonicmoe"))
    assert dict(model.named_parameters()) == before
    with pytest.raises(ValueError, match="moe has activation gelu; it computes gated silu and relu only"):
        check_sonicmoe("cuda", [("moe", "gelu", BF16)])
    with pytest.raises(RuntimeError, match=r'"sonicmoe": .+; use expert_gemm="torch"'):
        check_sonicmoe("cuda", [("moe", "silu", BF16)])  # not installed, or no GPU
