"""DeepSpeed's two ways to train experts in parallel: its own layer, and its conversion of transformers' models.

Both run under DeepSpeed's engine with ZeRO stage 0: with sharded optimizer state it clips by a norm that differs
between ranks with different experts, so that their dense weights would drift apart.
"""

from __future__ import annotations

import logging
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.systems.base import MissingError, System, Task, clip_by_total_norm
from hecate.models import ModelConfig
from hecate.models.moe import Experts, MoE, Routing, TopKGate

__all__ = ["deepspeed_autoep", "deepspeed_moe"]


def deepspeed_moe(task: Task) -> System:
    """`deepspeed.moe.layer.MoE` in place of every MoE layer, dropless. Collective."""
    if task.kind != "gpt":
        raise MissingError("deepspeed-moe replaces layers of Hecate's own model only: pass --model gpt")
    layer = _installed("deepspeed.moe.layer")
    if "sparse_routes" not in signature(_installed("deepspeed.moe.sharded_moe").TopKGate.forward).parameters:
        raise MissingError("the layer of this DeepSpeed takes no list of routes from its gate; that of 0.19.8 does")
    model = task.build()
    for block in model.blocks:  # type: ignore[union-attr]
        block.moe = _Layer(block.moe, layer, task.world.rank, task.world.size)
    return _system(task, model, {})


def deepspeed_autoep(task: Task) -> System:
    """A Mixtral whose layers DeepSpeed replaces by its own (`expert_parallel` of its config). Collective."""
    if task.kind != "mixtral":
        raise MissingError("deepspeed-autoep converts models of transformers only: pass --model mixtral")
    _installed("deepspeed.module_inject.auto_ep")
    _check_transformers()
    converted = {"enabled": True, "autoep_size": task.world.size, "preset_model": "mixtral"}
    system = _system(task, task.build(), {"expert_parallel": converted})
    for router in task.gates(system.model):
        router.register_forward_hook(_count_again)  # after the hook that replaces its choice
    return system


def _installed(name: str) -> Any:
    """The module of that name; MissingError without it."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise MissingError(f"{name} is not installed: pip install 'hecate-moe[deepspeed]'") from error


def _check_transformers() -> None:
    """MissingError if DeepSpeed cannot read where this version of transformers keeps which outputs may be recorded."""
    import deepspeed
    import transformers

    try:
        from transformers.utils import output_capturing
    except ImportError:
        return  # older versions have none
    if type(output_capturing._CAN_RECORD_REGISTRY) is not dict:
        raise MissingError(
            f"DeepSpeed {deepspeed.__version__} reads a table of recorded outputs that is no plain dict any more in "
            f"transformers {transformers.__version__}; it works with transformers 5.0"
        )


class _Layer(nn.Module):
    """DeepSpeed's layer with the weights of `moe`; called as `hecate.models.moe.MoE`."""

    def __init__(self, moe: MoE, layer: Any, rank: int, size: int) -> None:
        super().__init__()
        gate, experts = moe.gate, moe.experts
        expert = _Expert(experts)
        device = experts.up.device
        self.layer = layer.MoE(expert.d_model, expert, experts.num_experts, size, drop_tokens=False).to(device)
        self.layer.deepspeed_moe.gate = _Gate(gate)
        own = self.layer.deepspeed_moe.experts.deepspeed_experts
        for number, mine in enumerate(own, start=rank * len(own)):
            mine.take(experts, number)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output, aux_loss, _ = self.layer(hidden)
        return output, aux_loss


class _Expert(nn.Module):
    """One expert of `hecate.models.moe.Experts`."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        _, d_hidden, self.d_model = experts.up.shape
        self.up = nn.Linear(self.d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, self.d_model, bias=False)

    @torch.no_grad()
    def take(self, experts: Experts, number: int) -> None:
        """Copy the weights of expert `number`."""
        self.up.weight.copy_(experts.up[number])
        self.down.weight.copy_(experts.down[number])

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(rows)))


class _Gate(nn.Module):
    """The model's own gate, in the place of DeepSpeed's, so that all systems route alike.

    What DeepSpeed's own does besides stays: it finds the fullest expert of all ranks, to which all others are padded.
    """

    def __init__(self, gate: TopKGate) -> None:
        super().__init__()
        self.gate = gate
        self.ep_group: dist.ProcessGroup | None = None

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        """Called by DeepSpeed's engine."""
        self.ep_group = group

    def forward(self, tokens: Tensor, used: None, sparse_routes: bool, use_tutel: bool) -> tuple[Any, ...]:
        """Auxiliary loss, rows per expert, experts, int32 `[k, T]` experts, int32 `[k, T]` rows, weights, counts."""
        routing: Routing = self.gate(tokens)
        experts, chosen = self.gate.num_experts, routing.expert_index.t().contiguous()
        one_hot = nn.functional.one_hot(chosen.flatten(), experts)  # [k * T, E]
        rows = (one_hot.cumsum(0) * one_hot).sum(1).view_as(chosen) - 1
        counts = one_hot.sum(0)
        most = counts.max()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ep_group)
        weights = routing.weights.t().contiguous()
        return routing.aux_loss, most, experts, chosen.int(), rows.int(), weights, counts


def _count_again(router: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The router's output with the counts of the experts in it."""
    weights, chosen, counts = output
    return weights, chosen, torch.bincount(chosen.flatten(), minlength=len(counts)).to(counts.dtype)


def _system(task: Task, model: nn.Module, config: dict[str, Any]) -> System:
    """`model` under DeepSpeed's engine."""
    import deepspeed

    from hecate.integrations.deepspeed import local_rank_of

    sizes = task.settings.model
    assert isinstance(sizes, ModelConfig)
    if sizes.num_experts % task.world.size:
        raise MissingError(f"DeepSpeed cannot divide {sizes.num_experts} experts by {task.world.size}")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; it would be compiled first
    given = {"train_micro_batch_size_per_gpu": task.settings.batch_size, **config}
    optimizer = task.optimizer(model)
    with local_rank_of(task.world.device):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=given, dist_init_required=False)
    parameters = list(engine.module.parameters())
    own = [p for p in parameters if not getattr(p, "allreduce", True)]
    whole = [p for p in parameters if getattr(p, "allreduce", True)]
    clip = partial(clip_by_total_norm, own, whole)
    return System(task, engine, clip, optimizer=optimizer, backward=engine.backward, update=engine.step)
