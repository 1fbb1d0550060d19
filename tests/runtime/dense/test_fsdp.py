"""FSDP2 after passes that raised, by its own `reset_iter_state` and without it, as in torch 2.11 and 2.12."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tests.runtime.helpers import Pair, error_of, gpt, lm_loss, rank
from tests.workers import Groups


@contextmanager
def _torch_that_resets(resets: bool) -> Iterator[None]:
    own = FSDPModule.__dict__.get("reset_iter_state")
    if not resets and own is not None:
        del FSDPModule.reset_iter_state
    try:
        yield
    finally:
        if own is not None:
            FSDPModule.reset_iter_state = own


def _fail(*_: object) -> None:
    raise ArithmeticError("on purpose")


def _failed_forward(model: nn.Module) -> str:
    hook = model.blocks[1].register_forward_pre_hook(_fail)
    error = error_of(lambda: lm_loss(1)(model, rank()))
    hook.remove()
    return error


def _failed_backward(model: nn.Module) -> str:
    """The last block has reduced its gradients, and the weights of the first are gathered, when backward raises."""

    def watch(module: nn.Module, given: object, output: tuple[Tensor, ...]) -> None:
        output[0].register_hook(_fail)

    hook = model.blocks[0].register_forward_hook(watch)
    error = error_of(lambda: lm_loss(1)(model, rank()).backward())
    hook.remove()
    return error


def _run_after_failures(resets: bool) -> None:
    with _torch_that_resets(resets):
        pair = Pair(gpt())
        for fail in (_failed_forward, _failed_backward):
            pair.backward(lm_loss(0))
            with pair.engine.no_sync():
                lm_loss(2)(pair.model, rank()).backward()  # accumulated, not reduced
            assert "on purpose" in fail(pair.model)
            pair.engine.skip_step()
            pair.plain.zero_grad()
            for seed in (3, 4):
                pair.backward(lm_loss(seed))
            pair.check_gradients()


@pytest.mark.parametrize("resets", [True, False])
def test_a_pass_after_one_that_raised(groups: Groups, resets: bool) -> None:
    groups(2).run(_run_after_failures, resets)
