"""What a step is measured by: speed, share of the devices' peak (MFU), balance, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from hecate.adapters.base import find_experts
from hecate.models import ModelConfig
from hecate.train.distributed import World

__all__ = ["PEAK_TFLOPS", "Work", "measure", "peak_tflops"]

VERBS = ("gather", "reduce", "average", "count", "plan", "reshard")
"""Labels of which the seconds of a step are measured."""

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
}
"""bfloat16 TFLOP/s, without sparsity, of a device whose name contains the key, from the makers' data sheets.

`peak_tflops` of the configuration takes precedence: other forms of a device, e.g. PCIe cards, have other peaks.
"""


@dataclass(frozen=True)
class Work:
    """The size of a model and what a token costs.

    Attributes:
        parameters: all parameters.
        experts: number of experts of each MoE layer.
        top_k: experts per token; None if the model does not tell.
        active: parameters that one token uses: of each MoE layer's experts only `top_k`; None if that is unknown.
        flops_per_token: floating-point operations of forward and backward pass: 6 per active parameter, without
            embeddings that are only looked up, and 12 * layers * width * length for attention (Appendix B of arXiv
            2204.02311); what activation checkpointing computes again is not counted. None if the model has no config
            of Hecate or transformers.
    """

    parameters: int
    experts: tuple[int, ...]
    top_k: int | None
    active: int | None
    flops_per_token: int | None

    @classmethod
    def of(cls, model: nn.Module, length: int) -> Work:
        """Of a model that is not sharded yet, with sequences of `length` tokens."""
        specs = [found.spec for found in find_experts(model)]
        total, top_k, attention = sum(p.numel() for p in model.parameters()), *_sizes(model, length)
        experts = tuple(spec.num_experts for spec in specs)
        if top_k is None or attention is None:
            return cls(total, experts, top_k, None, None)
        sizes = [sum(prod(weight.shape) for weight in spec.weights) for spec in specs]
        active = total - sum(size * (number - top_k) for size, number in zip(sizes, experts, strict=True))
        matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        looked_up = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
        only = sum(number for key, number in looked_up.items() if key not in matrices)
        return cls(total, experts, top_k, active, 6 * (active - only) + attention)

    def tflops(self, tokens_per_second: float) -> float | None:
        """TFLOP/s at that speed; None if unknown."""
        return None if self.flops_per_token is None else self.flops_per_token * tokens_per_second / 1e12


def _sizes(model: nn.Module, length: int) -> tuple[int | None, int | None]:
    """Experts per token, and operations per token of attention; None if the config of the model does not say."""
    config: Any = getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        return config.top_k, 12 * config.num_layers * config.d_model * length
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    layers, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    attention = None if layers is None or width is None else 12 * layers * width * length
    return getattr(text, "num_experts_per_tok", None), attention


def peak_tflops(device: torch.device, given: float | None) -> float | None:
    """`given`, or the peak of a known CUDA device; None if it is unknown, as on a CPU."""
    if given is not None or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def _memory_in_use(device: torch.device) -> int:
    """Peak bytes so far: of the CUDA device's memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measure(stats: Mapping[str, Any], world: World, work: Work, tokens: int, begin: float) -> dict[str, Any]:
    """Metrics of a step from `FSSDP.stats()` after it. Collective.

    Args:
        stats: the engine's statistics.
        world: this process.
        work: what a token costs.
        tokens: of all devices in the step.
        begin: when the step began (`time.perf_counter`).
    """
    layers = stats["layers"]
    exposed = [sum(layer["exposed_seconds"] for layer in layers), *(stats["exposed"].get(verb, 0.0) for verb in VERBS)]
    longest = world.gather(exposed).max(dim=0).values.tolist()
    seconds = time.perf_counter() - begin
    worst = max(layers, key=lambda layer: float(layer["imbalance_after"]))
    mispredicted = [layer["mispredicted"] for layer in layers if layer["mispredicted"] is not None]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tflops": work.tflops(tokens / seconds),
        "devices": world.size,
        "memory_bytes": _memory_in_use(world.device),
        "imbalance_before": float(np.mean([layer["imbalance_before"] for layer in layers])),
        "imbalance_after": float(np.mean([layer["imbalance_after"] for layer in layers])),
        "imbalance_worst": float(worst["imbalance_after"]),
        "worst_layer": worst["name"],
        "why": worst["no_copies"] or worst["limited_by"],
        "copies": sum(layer["copies"] for layer in layers),
        "copies_calibrated": sum(int(layer["calibrated"].sum()) for layer in layers),
        "bytes_copied": sum(layer["bytes"] for layer in layers),
        "resharded_experts": stats["resharded"]["experts"],
        "resharded_bytes": stats["resharded"]["bytes"],
        "mispredicted": float(np.mean(mispredicted)) if mispredicted else None,
        "planning_seconds": stats["planning_seconds"],
        "exposed_seconds": longest[0],
        **{f"exposed_{verb}": value for verb, value in zip(VERBS, longest[1:], strict=True)},
        **{f"memory_{kind}": size for kind, size in stats["memory_bytes"].items()},
        "loads": [layer["loads"].tolist() for layer in layers],
    }
