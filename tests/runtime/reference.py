"""FSSDP against the plain model in one process: losses, gradients, norms and parameters over AdamW steps."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.models.gpt import GPTMoE
from hecate.models.transformer import ModelConfig
from hecate.values.full import full_tensor
from tests.bench import TOLERANCES, device, dtype_or, mean_over_ranks, mesh_of

TINY = ModelConfig(
    vocab_size=31, max_length=16, d_model=16, num_layers=3, num_heads=2, num_experts=8, top_k=2, expert_ratio=2
)


@dataclass(frozen=True)
class Case:
    """One training run to compare.

    Attributes:
        config: configuration of FSSDP.
        model: configuration of the model.
        dtype: dtype of the model, unless pytest was given one; how exact it is: `tests.bench.TOLERANCES`.
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
    engine = hecate.fully_shard(model, mesh_of(case.mesh), case.config)
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
            _close(case, "loss", f"step {step}", losses, expected)
            for name, p in reference.named_parameters():
                _close(case, "gradient", f"step {step} {name}", grads[name], _or_zeros(p.grad, p))
            reference_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            _close(case, "norm", f"step {step}", norm, reference_norm)
            reference_optimizer.step()
            reference_optimizer.zero_grad()
            assert list(parameters) == list(reference.state_dict())
            for name, value in reference.state_dict().items():
                _close(case, "parameter", f"step {step} {name}", parameters[name], value)
            if dtype_or(case.dtype) == torch.bfloat16:  # what it rounds differently would grow from step to step
                reference.load_state_dict(parameters)


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
        full[entry.name] = engine._whole(entry, grad)
    return full


def batches(case: Case, step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of one rank, the same wherever they are computed."""
    made = []
    for micro_batch in range(case.accumulate):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro_batch)
        size = case.batch[min(rank, len(case.batch) - 1)]
        tokens = torch.randint(case.model.vocab_size, (size, case.model.max_length + 1), generator=generator)
        made.append((tokens[:, :-1].to(device()), tokens[:, 1:].to(device())))
    return made


def _model(case: Case) -> nn.Module:
    model = GPTMoE(case.model).to(dtype_or(case.dtype))
    model.init_weights(seed=1)
    model.to(device())  # drawn on the CPU: the same values on all devices
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
    total = torch.zeros((), dtype=torch.float64, device=device())
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
    return mean_over_ranks(total)


def _train_reference(model: nn.Module, case: Case, step: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device())
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


def _close(case: Case, what: str, where: str, actual: Tensor, expected: Tensor) -> None:
    """Assert that the relative error is within `what` tolerates: that of the coarsest dtype involved."""
    dtypes = (dtype_or(case.dtype), case.config.reduce_dtype or torch.float64)
    tolerance = max(TOLERANCES[dtype].of(what) for dtype in dtypes)
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, norm = (actual - expected).norm(), expected.norm()
    assert error <= tolerance * norm.clamp(min=1e-30) or error < 1e-30, (
        f"{where}: relative error of the {what} {error / norm:.3g}, more than {tolerance:.3g}"
    )


def _or_zeros(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad
