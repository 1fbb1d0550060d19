"""Replicated parameters get their gradients whatever the loss is computed from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.helpers import Pair, case, floats, gpt, lm_loss, net, rank, square_loss
from tests.workers import Groups


def _early_loss(model: nn.Module, of: int) -> Tensor:
    """A loss of a hidden state before the first expert; the model's output is not used."""
    kept: list[Tensor] = []
    handle = model.first.register_forward_hook(lambda module, args, output: kept.append(output))
    model(floats(0, of))
    handle.remove()
    return kept[0].square().mean()


def _weight_loss(model: nn.Module, of: int) -> Tensor:
    """A loss that depends on weights but on no token: a penalty on a weight as it is during the pass."""
    kept: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda module, args, output: kept.append(module.weight))
    model(floats(0, of))
    handle.remove()
    return kept[0].square().sum()


def _losses() -> None:
    for loss_of in (_early_loss, _weight_loss):
        for mesh in (None, (2, 1)):
            with case(f"{loss_of.__name__}, {mesh}"):
                pair = Pair(net(), mesh, dense="replicate")
                optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5))
                for _ in range(2):
                    pair.backward(loss_of)
                    pair.check_gradients()
                    reached = {name for name, p in pair.model.named_parameters() if p.grad is not None}
                    assert reached == {name for name, p in pair.plain.named_parameters() if p.grad is not None}
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                pair.backward(square_loss(1))
                pair.check_gradients()
                pair.check_state()


def test_losses_that_reach_neither_experts_nor_the_output(groups: Groups) -> None:
    groups(2).run(_losses)


def _accumulated() -> None:
    """Such losses together with one of the output, in one step and inside `no_sync`."""
    pair = Pair(net(), dense="replicate")
    with pair.engine.no_sync():
        pair.backward(_early_loss)
        pair.backward(square_loss(1))
    assert pair.model.first.weight.grad is None
    pair.backward(_early_loss)
    pair.check_gradients()


def test_losses_accumulate(groups: Groups) -> None:
    groups(2).run(_accumulated)


def _after_a_refused_pass() -> None:
    """After a pass that raised, the model has the optimizer's parameters again."""
    pair = Pair(gpt(), dense="replicate")
    parameter = pair.model.head.weight
    handle = next(iter(pair.engine.pools[0].parameters.values())).register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="register_hook"):
        lm_loss(0)(pair.model, rank())
    assert pair.model.head.weight is parameter
    handle.remove()
    pair.backward(lm_loss(0))
    pair.check_gradients()


def test_refused_passes_leave_parameters_in_place(groups: Groups) -> None:
    groups(2).run(_after_a_refused_pass)
