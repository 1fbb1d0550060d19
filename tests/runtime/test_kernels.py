"""`FSSDPConfig.kernels`: what runs, what is said, and that all of a layer is computed by kernels on request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hecate
from hecate.adapters.transformers import fused_activation
from hecate.ops.kernels import launch
from hecate.runtime import setup
from tests.adapters.tiny import tiny_model
from tests.runtime.helpers import config, gpt, tokens

MIXED: dict[str, Any] = {"master_dtype": torch.float32, "param_dtype": torch.bfloat16}


def step(model: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor], kernels: str) -> tuple[list[Any], set[str]]:
    """Loss and gradients of one step, and the kernels that ran."""
    ran = set()
    run_kernel = launch.run_kernel

    def watched(name: str, *args: Any) -> None:
        ran.add(name)
        run_kernel(name, *args)

    with mock.patch.object(launch, "run_kernel", watched):
        engine = hecate.fully_shard(model, None, config("balanced", kernels=kernels, **MIXED))
        loss = loss_of(model)
        loss.backward()
        assert engine.stats()["kernels"] == kernels
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    engine.close()
    return [loss.detach(), *grads], ran


def close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b.float()).norm() <= 0.05 * b.float().norm() + 1e-6


def test_a_layer_runs_on_kernels_alone() -> None:
    results, ran = [], set()
    for kernels in ("torch", "hecate"):
        result, ran = step(gpt().float(), lambda model: model(*tokens(0, 0)).loss, kernels)
        assert (kernels == "hecate") == bool(ran)
        results.append(result)
    close(*results)
    # Hidden states are float32, and cast on their way into the rows of the experts.
    assert ran == {
        *("count", "sort", "scatter_f32_bf16", "activate_bf16", "combine_bf16_bf16", "pack_f32_bf16"),
        *("combine_backward_bf16_bf16", "activate_backward_bf16", "combine_bf16_f32"),
    }


def test_gated_activations_of_transformers_are_fused() -> None:
    results, ran, data = [], set(), torch.arange(32).view(2, 16)
    for kernels in ("torch", "hecate"):
        torch.manual_seed(0)
        model = tiny_model("qwen3_moe")
        (experts, *_) = (m for m in model.modules() if hasattr(m, "_apply_gate"))
        assert fused_activation(experts) == "silu"
        result, ran = step(model, lambda model: model(data, labels=data).loss, kernels)
        results.append(result)
    assert {"activate_bf16", "activate_backward_bf16"} <= ran
    close(*results)


class Gated(nn.Module):
    has_gate = True

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act_fn = act

    def _apply_gate(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def test_what_is_not_the_same_function_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Gated(nn.SiLU())
    assert fused_activation(plain) is None  # a gate of its own
    plain.has_gate = False
    assert fused_activation(plain) == "silu"
    plain.act_fn.register_forward_hook(lambda *_: None)
    assert fused_activation(plain) is None
    kinds = {}
    for act in (nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Mish()):
        plain.act_fn = act
        kinds[repr(act)] = fused_activation(plain)
    assert list(kinds.values()) == ["gelu", "gelu_tanh", "relu", None]
    plain.act_fn = nn.ReLU()
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.clamp(0, 6))
    assert fused_activation(plain) is None


def test_of_functions_only_silu_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Gated(F.silu)  # a function instead of a module, as LFM2 has
    plain.has_gate = False
    assert fused_activation(plain) == "silu"
    plain.act_fn = F.mish
    assert fused_activation(plain) is None
    monkeypatch.setattr(F, "silu", lambda x: x)  # a library has put another function into torch
    plain.act_fn = F.silu
    assert fused_activation(plain) is None


def test_by_name_they_are_there_or_nothing_is_changed() -> None:
    model = gpt()
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match=r'kernels="hecate": blocks.0.moe.experts has weights in torch.float64'):
        hecate.fully_shard(model, None, config("balanced", kernels="hecate"))
    assert dict(model.named_parameters()) == before
    with pytest.raises(ValueError, match=r"FSSDPConfig.kernels='cuda': must be one of 'auto', 'hecate', 'torch'"):
        config("balanced", kernels="cuda")


def test_auto_says_in_one_line_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(setup, "wanted", lambda *_: True)  # as on CUDA
    monkeypatch.setattr(setup, "reason_against", lambda *_: "CuPy cannot be imported")
    with caplog.at_level(logging.WARNING, logger="hecate"):
        engine = hecate.fully_shard(gpt(), None, config("balanced"))
    assert engine.stats()["kernels"] == "torch"
    engine.close()
    line = "Hecate's CUDA kernels are not used, PyTorch's operations are: rank 0: CuPy cannot be imported"
    assert caplog.messages == [line]
