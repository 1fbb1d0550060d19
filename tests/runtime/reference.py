"""FSSDP against the plain model in one process: losses, gradients, norms and parameters over AdamW steps."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import hecate
from hecate.models.gpt import GPTMoE
from hecate.models.transformer import ModelConfig
from hecate.values.full import full_experts, full_tensor
from hecate.values.local import local_tensor

TINY = ModelConfig(
    vocab_size=31, max_length=16, d_model=16, num_layers=3, num_heads=2, num_experts=8, top_k=2, expert_ratio=2
)


@dataclass(frozen=True)
class Case:
    """One training run to compare.

    Attributes:
        config: configuration of FSSDP.
        model: configuration of the model.
        dtype: float64 (compared within 1e-10, relative) or float32 (within 1e-5).
        accumulate: micro-batches per step.
        use_no_sync: skip the dense reduction in all micro-batches but the last.
        mesh: shape of the device mesh; None: all ranks.
        batch: number of sequences, by rank; the last number is used for all further ranks.
        router: "learned", "one" (all tokens on expert 0) or "unpicked" (nobody picks expert 3).
        steps: optimizer steps.
        joint_backward: one backward pass over the sum of all micro-batches' losses.
    """

    config: hecate.FSSDPConfig
    model: ModelConfig = field(default=TINY)
    dtype: torch.dtype = torch.float64
    accumulate: int = 1
    use_no_sync: bool = False
    mesh: tuple[int, ...] | None = None
    batch: tuple[int, ...] = (2,)
    router: str = "learned"
    steps: int = 5
    joint_backward: bool = False


def compare(case: Case) -> None:
    """Runs on every rank; rank 0 holds the reference and asserts."""
    torch.manual_seed(0)
    reference = _model(case)
    model = copy.deepcopy(reference)
    mesh = None if case.mesh is None else init_device_mesh("cpu", case.mesh, mesh_dim_names=("replicate", "shard"))
    engine = hecate.fully_shard(model, mesh, case.config)
    optimizer = _optimizer(model)
    reference_optimizer = _optimizer(reference)
    for step in range(case.steps):
        losses = _train(engine, model, case, step)
        grads = full_gradients(engine)
        norm = engine.clip_grad_norm_(0.5)
        optimizer.step()
        parameters = engine.full_state_dict()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            expected = _train_reference(reference, case, step)
            where = f"step {step}"
            _close(f"{where} loss", losses, expected, case)
            for name, p in reference.named_parameters():
                _close(f"{where} gradient of {name}", grads[name], _or_zeros(p.grad, p), case)
            reference_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            _close(f"{where} norm", norm, reference_norm, case)
            reference_optimizer.step()
            reference_optimizer.zero_grad()
            assert list(parameters) == list(reference.state_dict())
            for name, value in reference.state_dict().items():
                _close(f"{where} parameter {name}", parameters[name], value, case)


def run_twice(case: Case) -> None:
    """Two runs of the same seed end in the same bits."""
    first, second = _final_state(case), _final_state(case)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def full_gradients(engine: hecate.FSSDP) -> dict[str, Tensor]:
    """Gradients by original name, whole, on every rank. Collective."""
    full = {
        name: full_tensor(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in engine.model.named_parameters()
        if not name.startswith("hecate_pool_")
    }
    for entry in (entry for pool in engine.pools for entry in pool.entries()):
        grad = torch.zeros_like(entry.parameter) if entry.parameter.grad is None else entry.parameter.grad
        full[entry.name] = full_experts(entry, local_tensor(grad), engine._comms.experts)
    return full


def batches(case: Case, step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of one rank, the same wherever they are computed."""
    made = []
    for micro_batch in range(case.accumulate):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro_batch)
        size = case.batch[min(rank, len(case.batch) - 1)]
        tokens = torch.randint(case.model.vocab_size, (size, case.model.max_length + 1), generator=generator)
        made.append((tokens[:, :-1], tokens[:, 1:]))
    return made


def _model(case: Case) -> nn.Module:
    model = GPTMoE(case.model).to(case.dtype)
    model.init_weights(seed=1)
    with torch.no_grad():
        for block in model.blocks:
            _bend(block.moe.gate.weight, block.moe_norm.bias, case.router)
    return model


def _bend(gate: Tensor, bias: Tensor, router: str) -> None:
    """Skew the router: a norm's output sums to the sum of its bias, so a constant weight row gives a constant logit."""
    gate.mul_(20)
    if router != "learned":
        bias.fill_(1.0)
    if router == "one":
        gate[0] = 100.0
    if router == "unpicked":
        gate[3] = -100.0


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def _train(engine: hecate.FSSDP, model: nn.Module, case: Case, step: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    micro_batches = batches(case, step, dist.get_rank())
    joint = []
    for i, (tokens, targets) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last or not case.use_no_sync else engine.no_sync():
            loss = model(tokens, targets).loss
            if case.joint_backward:
                joint.append(loss)
            else:
                loss.backward()
        total += loss.detach()
    if joint:
        torch.stack(joint).sum().backward()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _train_reference(model: nn.Module, case: Case, step: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    world = dist.get_world_size()
    for rank in range(world):
        for tokens, targets in batches(case, step, rank):
            loss = model(tokens, targets).loss / world
            loss.backward()
            total += loss.detach()
    return total


def _final_state(case: Case) -> dict[str, Tensor]:
    model = _model(case)
    engine = hecate.fully_shard(model, None, case.config)
    optimizer = _optimizer(model)
    for step in range(case.steps):
        _train(engine, model, case, step)
        engine.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


def _close(what: str, actual: Tensor, expected: Tensor, case: Case) -> None:
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm().clamp(min=1e-30) or error < 1e-30, (
        f"{what}: relative error {error / expected.double().norm():.3g}"
    )


def _or_zeros(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad
