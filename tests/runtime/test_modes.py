"""What people do with a model beside training it: ways to train are in tests/adapters/test_works_under_training.py."""

from __future__ import annotations

import copy
import gc
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.models.gpt import GPTMoE
from tests.runtime.helpers import config
from tests.runtime.reference import TINY, full_gradients
from tests.workers import Groups

CHECKPOINTED = replace(TINY, checkpoint=True)


def _batch(seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank() if rank is None else rank
    tokens = torch.randint(31, (2, 17), generator=torch.Generator().manual_seed(100 * seed + rank))
    return tokens[:, :-1], tokens[:, 1:]


def _pair(model_config=TINY, **changes: object) -> tuple[nn.Module, nn.Module, hecate.FSSDP]:  # type: ignore[no-untyped-def]
    """(reference, sharded model, engine), float64."""
    reference = GPTMoE(model_config).double()
    with torch.no_grad():
        for block in reference.blocks:
            block.moe.gate.weight.mul_(20)
    model = copy.deepcopy(reference)
    return reference, model, hecate.fully_shard(model, None, config("balanced", **changes))


def _backward_reference(reference: nn.Module, seeds: tuple[int, ...]) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    for rank in range(world):
        for seed in seeds:
            (reference(*_batch(seed, rank)).loss / world).backward()


def _assert_gradients(engine: hecate.FSSDP, reference: nn.Module, only: str = "") -> None:
    gradients = full_gradients(engine)
    for name, parameter in reference.named_parameters():
        if only not in name:
            continue
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-9, atol=1e-13, msg=name)


def _step(engine: hecate.FSSDP, optimizer: torch.optim.Optimizer, seed: int) -> None:
    engine.model(*_batch(seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _rank_that_plans_otherwise() -> str:
    os.environ["HECATE_DEBUG"] = "1"
    try:
        _, model, engine = _pair()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _step(engine, optimizer, seed=0)
        if dist.get_rank() == 1:
            # What a nondeterministic router or a different file of loads would do.
            engine._engine.layers[2].history._steps[0][:, 0] += 10_000
        model(*_batch(1))
    except RuntimeError as error:
        return str(error)
    finally:
        del os.environ["HECATE_DEBUG"]
    return "no error"


def test_debug_names_the_rank_with_another_plan(groups: Groups) -> None:
    for message in groups(3).run(_rank_that_plans_otherwise):
        assert re.fullmatch(
            r"step 1: placement 2 is \[.*\] on rank 0 and \[.*\] on rank 1; all ranks must make the same plan", message
        )


def test_one_device_without_process_group() -> None:
    reference = GPTMoE(CHECKPOINTED).double()
    model = copy.deepcopy(reference)
    engine = hecate.fully_shard(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, reference)]
    for seed in range(3):
        for trained, optimizer in zip((model, reference), optimizers, strict=True):
            trained(*_batch(seed, rank=0)).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    state = engine.full_state_dict()
    assert list(state) == list(reference.state_dict())
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-12, msg=key)


def _backward_that_raises(dense: str) -> None:
    """A backward pass that failed half-way has no effect on the next step."""
    reference, model, engine = _pair(dense=dense)
    _step(engine, torch.optim.SGD(model.parameters(), lr=0.0), seed=5)  # so that there are copies

    def fail(grad: Tensor) -> None:
        raise ArithmeticError

    layer = model.blocks[1]
    handle = layer.register_forward_hook(lambda module, args, output: output[0].register_hook(fail) and None)
    with pytest.raises(ArithmeticError):
        model(*_batch(0)).loss.backward()
    handle.remove()
    if dense == "fsdp":
        model.reset_iter_state()
    model.zero_grad()
    model(*_batch(1)).loss.backward()
    _backward_reference(reference, (1,))
    _assert_gradients(engine, reference, only=".experts." if dense == "fsdp" else "")  # FSDP2's own are its business


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_a_backward_pass_that_raises_leaves_nothing(groups: Groups, dense: str) -> None:
    groups(2).run(_backward_that_raises, dense)


class _Opaque:
    """An output type in which Hecate finds no tensors."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *batch: Tensor) -> _Opaque:
        return _Opaque(self.inner(*batch).loss)


def _opaque_output(rematerialize: bool) -> None:
    reference = _Wrapped(GPTMoE(CHECKPOINTED).double())
    model = copy.deepcopy(reference)
    engine = hecate.fully_shard(model, None, config("balanced", dense="replicate", rematerialize=rematerialize))
    for seed in (5, 1):
        model.zero_grad()
        model(*_batch(seed)).loss.backward()
    _backward_reference(reference, (1,))
    _assert_gradients(engine, reference)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_output_that_cannot_be_looked_into(groups: Groups, rematerialize: bool) -> None:
    groups(2).run(_opaque_output, rematerialize)


def _state_after_a_pass_without_end(path: str) -> None:
    """After a pass without backward, the pass's plain tensors of another dtype must not be taken for the parameters."""
    model = _Wrapped(GPTMoE(TINY).double())
    replicate = config("balanced", dense="replicate", param_dtype=torch.bfloat16)
    engine = hecate.fully_shard(model, None, replicate)
    engine.init_weights(7)
    before = engine.full_state_dict()
    engine.save(path)
    for act in (lambda: engine.load(path), lambda: engine.init_weights(7), lambda: engine.save(path)):
        model(*_batch(1))
        act()
        model(*_batch(1))
        state = engine.full_state_dict()
        assert all(torch.equal(value, before[name]) for name, value in state.items())
    engine.init_weights(8)
    engine.load(path)
    assert all(torch.equal(value, before[name]) for name, value in engine.full_state_dict().items())


def test_state_after_a_pass_without_end(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(_state_after_a_pass_without_end, str(tmp_path / "checkpoint"))


def _inference_mode() -> None:
    for dense in ("replicate", "none"):  # FSDP2 itself refuses inference mode
        reference, model, _ = _pair(dense=dense, rematerialize=True)
        with torch.inference_mode():
            torch.testing.assert_close(model(*_batch(1)).logits, reference(*_batch(1)).logits, rtol=1e-9, atol=1e-12)
        model(*_batch(1)).loss.backward()


def test_inference_mode(groups: Groups) -> None:
    groups(2).run(_inference_mode)


def _memory_is_what_is_owned() -> tuple[int, int]:
    model = GPTMoE(TINY)
    hecate.fully_shard(model, None, config("balanced", dense="none"))
    local = [p for name, p in model.named_parameters() if name.startswith("hecate_pool_")]
    return sum(p.to_local().numel() for p in local), sum(
        w.numel() for block in GPTMoE(TINY).blocks for w in block.moe.experts.parameters()
    )


def test_each_device_owns_its_share(groups: Groups) -> None:
    for owned, everything in groups(3).run(_memory_is_what_is_owned):
        assert owned * 3 == everything


def test_stats_of_the_first_step_under_way() -> None:
    model = GPTMoE(TINY)
    engine = hecate.fully_shard(model)
    assert engine.stats()["layers"][0]["imbalance_before"] == 1.0
    model(*_batch(0, rank=0)).loss.backward()
    layer = engine.stats()["layers"][2]
    assert layer["name"] == "blocks.2.moe.experts"
    assert layer["loads"].sum() == layer["counts"].sum() == 2 * 16 * 2
    assert (layer["copies"], layer["bytes"]) == (0, 0)


def test_an_engine_that_goes_while_another_optimizer_steps() -> None:
    model = GPTMoE(TINY)
    hecate.fully_shard(model)
    kept, weight = [model], nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    del model

    def drop(*_: object) -> None:
        kept.clear()
        gc.collect()

    optimizer.register_step_post_hook(drop)
    optimizer.step()
    optimizer.step()
    assert not kept
