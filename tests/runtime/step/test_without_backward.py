"""Forward passes without a backward pass do not change parameters, memory and loads, as in a plain model."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.helpers import Net, Pair, case, error_of, gpt, lm_loss, rank, square_loss, tokens, world
from tests.workers import Groups

TOKENS = 2 * 8 * 2  # tokens of one rank in one pass, times top-k


def _evaluate(pair: Pair, seed: int = 50) -> None:
    with torch.no_grad():
        pair.model(*tokens(seed, rank()))


def _evaluate_with_grad(pair: Pair) -> None:
    pair.model.eval()
    assert pair.model(*tokens(50, rank())).loss.item() > 0
    pair.model.train()


def _evaluate_in_forward_of_training(pair: Pair) -> None:
    """Evaluate between the forward and the backward pass of another micro-batch, whose gradients are not used."""
    loss = lm_loss(50)(pair.model, rank())
    _evaluate(pair)
    loss.backward()
    pair.model.zero_grad()


EVALUATIONS: tuple[Callable[[Pair], None], ...] = (_evaluate, _evaluate_with_grad, _evaluate_in_forward_of_training)


def _evaluation_before(what: str, dense: str) -> None:
    """A training loop that evaluates just before the optimizer is made, gradients are clipped or set to zero."""
    for evaluate in EVALUATIONS:
        for changes in ({}, {"rematerialize": True, "reshard_interval": 1}):
            with case(f"{evaluate.__name__}, {changes}"):
                _train(Pair(gpt(), dense=dense, **changes), evaluate, what)


def _train(pair: Pair, evaluate: Callable[[Pair], None], what: str) -> None:
    if what == "optimizer":
        evaluate(pair)
    optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2))
    for seed in range(2):
        pair.backward(lm_loss(seed))
        if what == "clip" and evaluate is not _evaluate_in_forward_of_training:
            evaluate(pair)
        norm = pair.engine.clip_grad_norm_(0.1)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.1), rtol=1e-9, atol=0)
        for optimizer in optimizers:
            optimizer.step()
        if what == "zero_grad":
            evaluate(pair)
        for model in pair.both:
            model.zero_grad()
    pair.check_state(rtol=1e-8)


@pytest.mark.parametrize("what", ["optimizer", "clip", "zero_grad"])
@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_evaluation_before(groups: Groups, what: str, dense: str) -> None:
    groups(2).run(_evaluation_before, what, dense)


def _generation(dense: str) -> None:
    """Call the model token by token, as `generate()` does, before the optimizer is made and between steps."""
    pair = Pair(gpt(), dense=dense)
    for step in range(2):
        given = tokens(70 + step, rank())[0][:, :3]
        for model in pair.both:
            model.eval()
        ours, plain = given, given
        for _ in range(3):
            with torch.no_grad():
                ours = torch.cat([ours, pair.model(ours).logits[:, -1:].argmax(-1)], dim=1)
                plain = torch.cat([plain, pair.plain(plain).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(ours, plain)
        for model in pair.both:
            model.train()
        optimizers = pair.optimizers(lambda p: torch.optim.SGD(p, lr=0.1))
        pair.backward(lm_loss(step))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        pair.check_state()


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_generation_between_steps(groups: Groups, dense: str) -> None:
    groups(2).run(_generation, dense)


# Passes whose output is dropped.


def _live_bytes() -> int:
    """Bytes of all tensors. The least of some moments: a thread of gloo holds the last exchange's until it has run."""
    return min(_bytes_after(0.02) for _ in range(5))


def _bytes_after(seconds: float) -> int:
    time.sleep(seconds)
    gc.collect()
    held = {}
    for tensor in (o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def _memory(frozen: bool) -> None:
    for changes in ({}, {"rematerialize": True}, {"dense": "replicate"}):
        with case(f"{frozen=}, {changes}"):
            pair = Pair(gpt().requires_grad_(not frozen), **changes)
            if not frozen:
                pair.warm_up(lm_loss(9))
            pair.model.eval()
            arena, used = pair.engine._parts.copies_memory, []
            for number in range(21):
                if number in (2, 20):
                    gc.collect()  # passes that garbage keeps alive are released at the beginning of this one
                # The measured passes have one batch: what a pass keeps depends on its plan.
                assert lm_loss(2 if number == 20 else number)(pair.model, rank()).item() > 0
                if number in (2, 20):
                    used.append(_live_bytes() - arena.num_bytes)
            assert used[1] <= used[0], used
            # The arena keeps what the largest plans needed: of a pass, and of the one before it, which garbage held.
            layers = [layer.experts for layer in pair.engine._engine.layers]
            assert arena.num_bytes <= 2 * sum(8 * layer.memory_slots * layer.layout.numel for layer in layers)
            assert len(pair.engine._engine.passes._kept) <= 1
            assert pair.engine.stats()["step"] == (not frozen)


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_stays_the_same_over_many_passes(groups: Groups, frozen: bool) -> None:
    groups(2).run(_memory, frozen)


def _loads_of(pair: Pair) -> list[int]:
    return [int(layer["loads"].sum()) for layer in pair.engine.stats()["layers"]]


def _not_booked() -> None:
    """Only passes with a backward pass count, in the loads of the step and in the history for the next plan."""
    for changes in ({}, {"rematerialize": True}, {"dense": "replicate"}):
        with case(changes):
            pair = Pair(gpt(), **changes)
            optimizer = torch.optim.SGD(pair.model.parameters(), lr=0.1)
            for seed in range(3):
                lm_loss(10 + seed)(pair.model, rank())  # dropped at once
                dropped = lm_loss(20 + seed)(pair.model, rank())
                _evaluate(pair)
                lm_loss(seed)(pair.model, rank()).backward()
                del dropped
                optimizer.step()
                optimizer.zero_grad()
                assert _loads_of(pair) == [TOKENS * world()] * 2
            for layer in pair.engine._engine.layers:
                assert layer.history.array().sum(axis=(1, 2)).tolist() == [TOKENS * world()] * 3
            assert pair.engine.stats()["step"] == 3


def test_passes_without_backward_are_not_booked(groups: Groups) -> None:
    groups(2).run(_not_booked)


def _backbone() -> list[str]:
    """Call a part of the model alone: before any pass, after an evaluation, and after a step."""

    def call(pair: Pair) -> Any:
        return lambda: pair.model.blocks[0](torch.zeros(1, 8, 8, dtype=torch.float64))

    pair = Pair(gpt(), dense="none")
    errors = [error_of(call(pair))]
    _evaluate(pair)
    errors.append(error_of(call(pair)))
    with torch.no_grad():
        errors.append(error_of(call(pair)))
    pair.warm_up(lm_loss(0))
    errors.append(error_of(call(pair)))
    pair.warm_up(lm_loss(0))  # the model itself goes on
    return errors


def test_backbone_instead_of_the_model(groups: Groups) -> None:
    for errors in groups(2).run(_backbone):
        assert len(errors) == 4
        for error in errors:
            assert error.startswith("RuntimeError: blocks.0.moe.experts: called outside a forward pass of the model")
            assert error.endswith("call that model instead")


def _evaluation_between() -> None:
    """Device 0 owns all experts, so it has no row for copies; its buffers change hands all the same."""
    torch.manual_seed(0)
    pair = Pair(Net((1, 1, 1), top_k=1).double(), dense="replicate", rematerialize=True, memory_slots=1)
    pair.warm_up(square_loss(0))
    loss = square_loss(1)(pair.model, rank())
    with torch.no_grad():
        square_loss(2)(pair.model, rank())
    loss.backward()
    pair.backward_plain(square_loss(1))
    pair.check_gradients()


def test_evaluation_between_forward_and_backward_if_one_device_owns_all_experts(groups: Groups) -> None:
    groups(2).run(_evaluation_between)
