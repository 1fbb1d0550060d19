"""One MoE layer forward and backward, and a whole model, in percent of a large product; `gpu_check.py` runs them.

Operations are counted as 2 per weight and row forward, and 4 backward, of the experts' products alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import hecate
from benchmarks.gpu_timing import emit, matmul_ceiling, seconds
from hecate.models import GPTMoE
from hecate.models.moe import MoE
from hecate.models.transformer import ModelConfig
from hecate.ops.grouped import Groups, grouped_linear
from hecate.ranks.messages import HostCopy
from hecate.runtime.tokens import counts

__all__ = ["layers", "train"]


@dataclass(frozen=True)
class Shape:
    """A layer: its model's name, tokens, width, hidden width of an expert, experts, and experts per token."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def operations(self) -> int:
        """Of a forward pass."""
        return 2 * self.tokens * self.top_k * 3 * self.hidden * self.width

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.tokens} tokens, width {self.width}, hidden {self.hidden}, top {self.top_k} of "
            f"{self.experts}"
        )


SHAPES = (
    Shape("Qwen3-30B-A3B", 16384, 2048, 768, 128, 8),
    Shape("Mixtral-8x7B", 16384, 4096, 14336, 8, 2),
    Shape("DeepSeek-V3, 64 of 256 experts", 16384, 7168, 2048, 64, 8),
)
DRY = (Shape("dry run", 64, 32, 16, 8, 2),)

Outs = tuple[Tensor, ...]
Pass = Callable[[], Outs]
"""A forward pass; returns its outputs, from which the backward pass begins."""


class Layer(nn.Module):
    """The experts of a Qwen3-MoE, of any shape; the other two models' experts compute the same function."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=shape.width,
            moe_intermediate_size=shape.hidden,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = "grouped_mm"
        with torch.device(device):
            self.experts = Qwen3MoeExperts(config).to(torch.bfloat16)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As an experts module of transformers."""
        return self.experts(hidden, index, weights)


def layers(device: torch.device) -> None:
    """Each shape by Hecate, by transformers' grouped path, and its grouped products alone."""
    ceiling = matmul_ceiling(device)
    emit("large product in bfloat16", "torch", "operations per second", ceiling)
    times: dict[str, list[float]] = {}
    shapes = SHAPES if device.type == "cuda" else DRY
    for shape in shapes:
        ways: tuple[tuple[str, Callable[[Shape, torch.device], Iterator[Pass]]], ...] = (
            ("hecate", _hecate),
            ("hecate, splits on the device", partial(_hecate, splits="device")),
            ("grouped products alone", _products),
            ("transformers' grouped path", _transformers),
        )
        for name, way in ways:
            for forward in way(shape, device):
                times.setdefault(name, []).append(_measure(shape, name, forward, ceiling, device))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    own = times.pop("hecate")
    for name, others in times.items():
        ratios = [theirs / ours for theirs, ours in zip(others, own, strict=True)]
        for shape, ratio in zip(shapes, ratios, strict=True):
            emit(f"{shape}, forward and backward", "hecate", f"speed over {name}", ratio)
        emit("geometric mean, forward and backward", "hecate", f"speed over {name}", geometric_mean(ratios))


def _measure(shape: Shape, name: str, forward: Pass, ceiling: float, device: torch.device) -> float:
    """Emit times of both directions; returns their sum."""

    def prepare() -> tuple[Outs, Outs]:
        outs = forward()
        return outs, tuple(torch.ones_like(out) for out in outs)

    forward_seconds = seconds(forward, device)
    backward_seconds = seconds(torch.autograd.backward, device, prepare=prepare)
    for direction, taken, factor in (("forward", forward_seconds, 1), ("backward", backward_seconds, 2)):
        share = factor * shape.operations / taken / ceiling
        emit(str(shape), name, f"{direction} time", 1e6 * taken, "us")
        emit(str(shape), name, f"{direction} of the product", 100 * share, "%")
    if name.startswith("hecate"):
        _host_time(shape, name, forward, device)
    return forward_seconds + backward_seconds


def _host_time(shape: Shape, name: str, forward: Pass, device: torch.device) -> None:
    """Time of the host thread per direction, without its waits, and their number; the device is idle before."""
    found, waits = [], 0
    for _ in range(7 if device.type == "cuda" else 1):
        with _waiting() as waited:
            begin = time.perf_counter()
            outs = forward()
            ahead, waits = time.perf_counter() - begin - sum(waited), len(waited)
            grads = tuple(torch.ones_like(out) for out in outs)
            _settle(device)
            begin = time.perf_counter()
            torch.autograd.backward(outs, grads)  # with splits="device" it first reads counts that are there already
            found.append((ahead, time.perf_counter() - begin))
            _settle(device)
    for direction, times in zip(("forward", "backward"), zip(*found, strict=True), strict=True):
        emit(str(shape), name, f"host time {direction}", 1e6 * sorted(times)[len(times) // 2], "us")
    emit(str(shape), name, "waits of the host in a layer", waits)


@contextmanager
def _waiting() -> Iterator[list[float]]:
    """Gives a list of the seconds of each of the host's waits for counts."""
    waited: list[float] = []

    def timed(wait: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(what: Any) -> Any:
            begin = time.perf_counter()
            try:
                return wait(what)
            finally:
                waited.append(time.perf_counter() - begin)

        return run

    with (
        mock.patch.object(counts, "_on_host", timed(counts._on_host)),
        mock.patch.object(HostCopy, "wait", timed(HostCopy.wait)),
    ):
        yield waited


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts of a skewed router, and weights."""
    hidden = torch.randn(shape.tokens, shape.width, dtype=torch.bfloat16, device=device, requires_grad=True)
    popularity = -torch.arange(1, shape.experts + 1, device=device).log() / 2
    noise = -torch.rand(shape.tokens, shape.experts, device=device).log()
    index = (popularity - noise.log()).topk(shape.top_k, dim=1).indices
    weights = torch.rand(index.shape, device=device, requires_grad=True)
    return hidden, index, weights


def _hecate(shape: Shape, device: torch.device, splits: Literal["host", "device"] = "host") -> Iterator[Pass]:
    # On the CPU torch multiplies all experts in one call in float32 only, which "device" needs.
    dtype = torch.bfloat16 if device.type == "cuda" or splits == "host" else torch.float32
    model, inputs = Layer(shape, device).to(dtype), _inputs(shape, device)
    inputs = (inputs[0].detach().to(dtype).requires_grad_(), *inputs[1:])
    settings = hecate.FSSDPConfig(kernels="hecate", splits=splits, calibrate="pays" if splits == "host" else False)
    engine = hecate.fully_shard(model, None, settings)
    yield _fresh(model, inputs)
    engine.close()


def _transformers(shape: Shape, device: torch.device) -> Iterator[Pass]:
    hidden, index, weights = _inputs(shape, device)
    yield _fresh(Layer(shape, device), (hidden, index, weights.detach().to(hidden.dtype).requires_grad_()))


def _fresh(model: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
    """A forward pass whose gradients are made anew."""

    def forward() -> Outs:
        for tensor in (*model.parameters(), *inputs):
            tensor.grad = None
        return (model(*inputs),)

    return forward


def _products(shape: Shape, device: torch.device) -> Iterator[Pass]:
    """The two products on rows that are sorted already, and nothing else."""
    rows = torch.bincount(_inputs(shape, device)[1].flatten(), minlength=shape.experts).tolist()
    groups, layer = Groups.of(rows, device), Layer(shape, device)
    sizes = (shape.width, shape.hidden)
    ins = [torch.randn(sum(rows), n, dtype=torch.bfloat16, device=device, requires_grad=True) for n in sizes]
    stacks = (layer.experts.gate_up_proj, layer.experts.down_proj)

    def forward() -> Outs:
        for tensor in (*ins, *stacks):
            tensor.grad = None
        return tuple(grouped_linear(x, weight, groups) for x, weight in zip(ins, stacks, strict=True))

    yield forward


# A whole model.

SMALL_GPT = ModelConfig(vocab_size=256, d_model=768, num_layers=12, num_heads=12, num_experts=64, max_length=2048)
"""GPT-MoE-S of the paper's table, as in conf/model/gpt_moe_s.yaml."""
DRY_GPT = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, num_experts=4, max_length=16)


def train(device: torch.device, trace: Path | None = None) -> None:
    """Tokens per second of training GPT-MoE-S on one rank: bfloat16, float32 master weights, FSDP2, fused AdamW.

    A profile of one more step goes to `trace`: Perfetto shows the kernels and Hecate's labels (`hecate.labels`).
    """
    on_cuda = device.type == "cuda"
    config, batch = (SMALL_GPT, 8) if on_cuda else (DRY_GPT, 2)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=store, rank=0, world_size=1)
    with torch.device(device):
        model = GPTMoE(config)
    model.init_weights(seed=0)
    active = _active_weights(model)
    settings = hecate.FSSDPConfig(master_dtype=torch.float32, param_dtype=torch.bfloat16, kernels="hecate")
    engine = hecate.fully_shard(model, None, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(config.vocab_size, (batch, config.max_length + 1), device=device)

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    taken, trained = seconds(step, device, repeats=5), batch * config.max_length
    setting = f"{'GPT-MoE-S' if on_cuda else 'dry run'}, {batch} sequences of {config.max_length}"
    emit(setting, "hecate", "tokens per second", trained / taken)
    share = 6 * active * trained / taken / matmul_ceiling(device)
    emit(setting, "hecate", "6 operations per active weight and token, of the product", 100 * share, "%")
    if trace is not None:
        _profile(step, device, trace)
    engine.close()
    dist.destroy_process_group()


def _profile(step: Callable[[], None], device: torch.device, path: Path) -> None:
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as found:
        step()
        _settle(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))
    labels = sum(event.name.startswith("hecate::") for event in found.events() or ())
    emit("profile of a step", "hecate", "labels", labels)


def _active_weights(model: GPTMoE) -> int:
    """Weights that one token goes through, embeddings left out."""
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    held = [sum(p.numel() for p in moe.experts.parameters()) for moe in moes]
    tables = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    rest = sum(p.numel() for p in model.parameters()) - sum(held) - tables
    return rest + sum(n * moe.gate.top_k // moe.gate.num_experts for n, moe in zip(held, moes, strict=True))
