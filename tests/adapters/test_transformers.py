"""Every transformers architecture with the experts interface trains as it does in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hecate.adapters.transformers import _activated
from tests.adapters.parity import CONFIG, compare_with_plain
from tests.adapters.tiny import ARCHITECTURES, known, tiny_model
from tests.workers import Groups

OFTEN = (
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "jamba",
    "lfm2_moe",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)
"""What `make test` runs; `make test-all` runs all."""


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("model_type", known(ARCHITECTURES, OFTEN))
def test_parity(groups: Groups, model_type: str, world_size: int) -> None:
    groups(world_size).run(compare_with_plain, model_type, CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["silu", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "relu", "relu2"]
)
def test_activations_without_kernels_have_the_modules_bits(name: str, dtype: torch.dtype) -> None:
    from transformers.activations import ACT2FN

    (experts, *_) = (m for m in tiny_model("qwen3_moe").modules() if hasattr(m, "_apply_gate"))
    experts.act_fn = ACT2FN[name]
    assert isinstance(experts.act_fn, nn.Module)
    rows = torch.randn(64, 32).mul(3).to(dtype).requires_grad_()
    grad = torch.randn(64, 16).to(dtype)
    outputs = [_activated(experts, rows, by_kernels=False), experts._apply_gate(rows)]
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(output, rows, grad)[0] for output in outputs))
