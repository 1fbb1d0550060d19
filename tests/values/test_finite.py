"""NaN and infinity are reported with layer and expert on all ranks, and a skipped step has no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import hecate
from hecate.errors import NonFiniteError
from hecate.values.local import local_tensor
from tests.checkpoint.runs import BALANCED, TINY, Run
from tests.values.experts import EXPERT, row_of_expert
from tests.workers import Groups

VARIANTS: dict[str, dict[str, object]] = {
    "fsdp": {"config": BALANCED},
    "fsdp that reduces in another dtype": {"config": replace(BALANCED, reduce_dtype=torch.float32)},
    "replicate": {"config": replace(BALANCED, dense="replicate")},
    "re-materialized": {"config": replace(BALANCED, rematerialize=True)},
    "checkpointed": {"config": BALANCED, "model": replace(TINY, checkpoint=True)},
}
INF, NAN = float("inf"), float("nan")


@contextmanager
def weight_is(run: Run, layer: int, value: float) -> Iterator[None]:
    """Change one weight of one expert, on the rank that owns it."""
    run.evaluate()  # experts move in the first forward pass of a step
    row = row_of_expert(run, layer, lambda parameter: parameter)
    before = None if row is None else row.clone()
    if row is not None:
        row[0, 0] = value
    yield
    if row is not None and before is not None:
        row.copy_(before)


def bad_gradient(run: Run) -> list[str]:
    run.loss(50).backward()
    row = row_of_expert(run, 1, lambda parameter: parameter.grad)
    if row is not None:
        row[0, 0] = INF
    assert not torch.isfinite(run.engine.clip_grad_norm_(0.5))
    return run.engine.non_finite()


def bad_dense_gradient(run: Run) -> list[str]:
    loss = run.loss(50)
    loss.backward()
    gradient = run.model.head.weight.grad
    assert isinstance(gradient, DTensor)
    local_tensor(gradient)[0, 0] = NAN
    assert not torch.isfinite(run.engine.clip_grad_norm_(0.5))
    return run.engine.non_finite(loss)


def weight_before_a_router(run: Run) -> list[str]:
    with run.engine.no_sync():
        run.loss(51).backward()
    with weight_is(run, 0, NAN):
        with pytest.raises(NonFiniteError, match=r"blocks\.1\.moe\.experts: the router of rank"):
            run.loss(50)
        return run.engine.non_finite()


def weight_after_the_last_router(run: Run) -> list[str]:
    with weight_is(run, TINY.num_layers - 1, INF):
        loss = run.loss(50)
        loss.backward()
        assert not torch.isfinite(run.engine.clip_grad_norm_(0.5))
        return run.engine.non_finite(loss)


def backward_that_raises(run: Run) -> list[str]:
    run.loss(51).backward()
    seen: list[Tensor] = []
    handle = run.model.blocks[1].moe.register_forward_hook(lambda module, args, output: seen.append(output))

    def refuse(grad: Tensor) -> None:
        raise ValueError("refused")

    loss = run.loss(50)
    handle.remove()
    (seen[0] if isinstance(seen[0], Tensor) else seen[0][0]).register_hook(refuse)
    with pytest.raises(ValueError, match="refused"):
        loss.backward()
    return run.engine.non_finite(loss)


def router_of_one_rank(run: Run) -> list[str]:
    """One replica must not raise while the others wait for it: instead the norm shows the NaN to all replicas."""
    rank = dist.get_rank()
    handle = run.model.blocks[1].moe.register_forward_pre_hook(
        lambda module, args: (args[0] * (NAN if rank == 0 else 1.0), *args[1:])
    )
    loss = run.loss(50)
    handle.remove()
    loss.backward()
    assert not torch.isfinite(run.engine.clip_grad_norm_(0.5))
    return run.engine.non_finite(loss)


ACCIDENTS: dict[Callable[[Run], list[str]], list[str]] = {
    bad_gradient: [f"gradient of blocks.1.moe.experts.up, expert {EXPERT}"],
    bad_dense_gradient: ["gradient of head.weight"],
    weight_before_a_router: [f"blocks.0.moe.experts.up, expert {EXPERT}"],
    weight_after_the_last_router: [f"blocks.{TINY.num_layers - 1}.moe.experts.up, expert {EXPERT}", "loss of rank 0"],
    backward_that_raises: [],
}


def with_accident(accident: Callable[[Run], list[str]] | None, settings: dict[str, object]) -> tuple[object, ...]:
    """Names of what was not finite in an additional third step, and the results of the other steps."""
    run = Run(**settings)  # type: ignore[arg-type]
    losses, names = run.train(0, 3), []
    if accident is not None:
        names = accident(run)
        run.engine.skip_step()
        assert all(p.grad is None for p in run.model.parameters())
    plans = len(run.plans)
    losses += run.train(3, 6)
    copies = run.engine._parts.copies_memory.num_bytes
    return names, losses, run.plans[plans:], copies, run.engine.full_state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipped_step_leaves_no_trace(groups: Groups, variant: str) -> None:
    settings = VARIANTS[variant]
    undisturbed = groups(2).run(with_accident, None, settings)
    for accident, expected in ACCIDENTS.items():
        ranks = groups(2).run(with_accident, accident, settings)
        assert ranks[0][0] == ranks[1][0]
        for (names, *run, state), (_, *same, same_state) in zip(ranks, undisturbed, strict=True):
            assert names[: len(expected)] == expected, accident
            assert bool(names) == bool(expected)
            assert run == same, accident
            assert state.keys() == same_state.keys()
            assert all(torch.equal(value, same_state[name]) for name, value in state.items()), accident


def test_one_of_two_replicas(groups: Groups) -> None:
    settings = {"config": BALANCED, "mesh": (2, 1)}
    undisturbed = groups(2).run(with_accident, None, settings)
    disturbed = groups(2).run(with_accident, router_of_one_rank, settings)
    for (names, *run, state), (_, *same, same_state) in zip(disturbed, undisturbed, strict=True):
        assert names[0] == "loss of rank 0"
        assert run == same
        assert all(torch.equal(value, same_state[name]) for name, value in state.items())


def test_on_one_device() -> None:
    run = Run()
    run.train(0, 1)
    assert run.engine.non_finite(torch.ones(2)) == []
    for accident, expected in ACCIDENTS.items():
        if accident is not bad_dense_gradient:
            assert accident(run)[: len(expected)] == expected
            run.engine.skip_step()


def test_gradients_under_a_norm_that_is_not_finite_stay() -> None:
    run = Run(hecate.FSSDPConfig())
    run.loss(0).backward()
    before = {p: p.grad.clone() for p in run.model.parameters()}
    run.model.head.weight.grad[0, 0] = NAN
    assert torch.isnan(run.engine.clip_grad_norm_(1e-3))
    for parameter, grad in before.items():
        unchanged = parameter.grad == grad
        assert unchanged.sum() >= grad.numel() - 1
    run.model.head.weight.grad[0, 0] = 0.0
    norm = run.engine.clip_grad_norm_(1e-3)
    assert float(run.engine.clip_grad_norm_(1.0)) == pytest.approx(1e-3, rel=1e-3)
    assert norm > 1e-3
