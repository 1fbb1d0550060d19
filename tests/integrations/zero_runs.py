"""Runs with DeepSpeed for the dense part, on every rank of a group; compared with the plain model in one process."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from tests.runtime.helpers import config
from tests.runtime.reference import TINY, Case, _model, _or_zeros, _train_reference, batches

LAST = 1
RTOL = 1e-5


def zero_config(stage: int, **changes: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}} | changes


def deepspeed_initialize() -> Any:
    """`hecate.integrations.deepspeed.initialize`, without an op that DeepSpeed would compile on CPUs for inference."""
    import deepspeed

    from hecate.integrations.deepspeed import initialize

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.groups._WORLD_GROUP = None  # of the test before: it was destroyed, see tests/workers.py
    return initialize


def prepared(model: nn.Module, stage: int, **changes: Any) -> tuple[hecate.FSSDP, torch.optim.Optimizer, Any]:
    """The engine, the optimizer and what is to be called, for one of the dense parts; `stage` 0 is FSDP2."""
    initialize = deepspeed_initialize()
    given = config("balanced", dense="deepspeed" if stage else "fsdp", reshard_interval=1, **changes)
    engine = hecate.fully_shard(model, None, given)
    optimizer = adamw(model)
    bf16 = given.param_dtype == torch.bfloat16
    if not stage:
        return engine, optimizer, model
    return engine, optimizer, initialize(engine, optimizer, zero_config(stage, bf16={"enabled": bf16}))


def equals_under_checkpointing(stage: int, use_reentrant: bool) -> None:
    equals_the_plain_model(stage, checkpoint=True, use_reentrant=use_reentrant)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, so that their settings must find their way to DeepSpeed's optimizer."""
    named = dict(model.named_parameters())
    plain = [p for name, p in named.items() if p.ndim < 2]
    rest = [p for name, p in named.items() if p.ndim >= 2]
    return torch.optim.AdamW([{"params": rest, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3)


def train(engine: hecate.FSSDP, optimizer: Any, call: Any, case: Case, steps: range) -> list[float]:
    """Train; returns the norms of the gradients before clipping."""
    norms = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        made = batches(case, step, dist.get_rank())
        for i, (tokens, targets) in enumerate(made):
            with nullcontext() if i == len(made) - LAST else engine.no_sync():
                loss = call(tokens, targets).loss
                call.backward(loss) if step % 2 and call is not engine.model else loss.backward()
        norms.append(float(engine.clip_grad_norm_(0.05)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def case(**changes: Any) -> Case:
    return Case(config("balanced"), dtype=torch.float32, accumulate=2, model=replace(TINY, **changes))


def equals_the_plain_model(stage: int, **changes: Any) -> None:
    torch.manual_seed(0)
    reference = _model(case())
    engine, optimizer, call = prepared(_model(case(**changes)), stage)
    norms = train(engine, optimizer, call, case(), range(4))
    with torch.no_grad():  # the model itself may be evaluated
        engine.model(*batches(case(), 0, dist.get_rank())[0])
    parameters = engine.full_state_dict()
    if dist.get_rank() == 0:
        expected = train_plain(reference, range(4))
        close("norms", torch.tensor(norms), torch.tensor(expected))
        for name, value in reference.state_dict().items():
            close(name, parameters[name], value)


def train_plain(reference: nn.Module, steps: range) -> list[float]:
    optimizer, norms = adamw(reference), []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        _train_reference(reference, case(), step)
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def goes_on_from_a_checkpoint(folder: str, before: int, after: int) -> None:
    """Two steps with one dense part, saved, loaded with the other, and two more: as four with the first one."""
    path = Path(folder) / f"{before}-{after}"
    dtypes: dict[str, Any] = {"master_dtype": torch.float32}
    engine, optimizer, call = prepared(_model(case()), before, **dtypes)
    train(engine, optimizer, call, case(), range(2))
    engine.save(path, optimizer)
    weights = engine.full_state_dict()
    train(engine, optimizer, call, case(), range(2, 4))
    other, its_optimizer, its_call = prepared(_model(case()), after, **dtypes)
    other.load(path, its_optimizer)
    for name, value in other.full_state_dict().items():
        assert torch.equal(value, weights[name]), name
    train(other, its_optimizer, its_call, case(), range(2, 4))
    there = other.full_state_dict()
    for name, value in engine.full_state_dict().items():
        close(name, there[name], value)
    other.save(path, its_optimizer)


def keeps_float32_masters(folder: str) -> None:
    """With bfloat16 the masters are saved and loaded, not the coarser parameters; a resumed run has the same bits."""
    runs = [prepared(_model(case()), 2, param_dtype=torch.bfloat16) for _ in range(2)]
    (first, optimizer, call), (second, its_optimizer, its_call) = runs
    train(first, optimizer, call, case(), range(2))
    first.save(folder, optimizer)
    second.load(folder, its_optimizer)
    second.save(f"{folder}-again", its_optimizer)  # before its first step
    second.load(f"{folder}-again", its_optimizer)
    weights = second.full_state_dict()
    assert any((value != value.bfloat16().float()).any() for name, value in weights.items() if "attention" in name)
    for engine, held, run in ((first, optimizer, call), (second, its_optimizer, its_call)):
        train(engine, held, run, case(), range(2, 4))
    there = second.full_state_dict()
    for name, value in first.full_state_dict().items():
        assert torch.equal(value, there[name]), name


def skips_what_is_not_finite(stage: int) -> None:
    """A skipped step, and one that DeepSpeed skips, leave everything as it was; no gradient reaches the next step."""
    engine, optimizer, call = prepared(_model(case()), stage)
    untouched, its_optimizer, its_call = prepared(_model(case()), stage)
    tokens, targets = batches(case(), 9, dist.get_rank())[0]
    with engine.no_sync():
        call(tokens, targets).loss.backward()
    engine.skip_step()
    for step in (lambda: engine.skip_step(), optimizer.step):
        (call(tokens, targets).loss * float("nan")).backward()
        assert not torch.isfinite(engine.clip_grad_norm_(1.0))
        step()
        optimizer.zero_grad()
    call(tokens, targets)
    engine.skip_step()  # a forward pass without a backward pass
    train(engine, optimizer, call, case(), range(1))
    train(untouched, its_optimizer, its_call, case(), range(1))
    expected = untouched.full_state_dict()
    for name, value in engine.full_state_dict().items():
        close(name, value, expected[name])


def refusals() -> list[str]:
    """The messages of what would go wrong without a word."""
    engine = hecate.fully_shard(model := _model(case()), None, config("balanced", dense="deepspeed"))
    optimizer = adamw(model)
    tokens, targets = batches(case(), 0, dist.get_rank())[0]
    initialize = deepspeed_initialize()

    def message(call: Any) -> str:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            return str(error)
        return "no error"

    said = [message(lambda: model(tokens, targets))]
    bad = (
        zero_config(3),
        zero_config(2, fp16={"enabled": True}),
        zero_config(2, bf16={"enabled": True}),
        zero_config(2, gradient_clipping=1.0),
        zero_config(1, gradient_accumulation_steps=4),
        zero_config(1, optimizer={"type": "Adam"}),
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    )
    said += [message(lambda given=given: initialize(engine, optimizer, given)) for given in bad]
    part = torch.optim.AdamW([p for name, p in model.named_parameters() if "moe" not in name])
    said.append(message(lambda: initialize(engine, part, zero_config(2))))
    zero = initialize(engine, optimizer, zero_config(2))
    said.append(message(lambda: model(tokens, targets)))
    zero(tokens, targets)
    said.append(message(lambda: zero(tokens, targets)))
    engine.skip_step()
    with engine.no_sync():
        zero(tokens, targets).loss.backward()
    said.append(message(optimizer.step))
    zero(tokens, targets).loss.backward()
    said.append(message(zero.step))
    engine.skip_step()
    said.append(message(lambda: zero.save_checkpoint("folder")))
    model.blocks[0].moe_norm.bias.requires_grad_(False)
    said.append(message(lambda: zero(tokens, targets)))
    return said


def close(what: str, actual: Tensor, expected: Tensor) -> None:
    actual, expected = _or_zeros(actual, expected).double(), expected.detach().double()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < RTOL, f"{what}: {error:.3g}"
