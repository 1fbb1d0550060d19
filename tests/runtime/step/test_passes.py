"""Combinations of passes: retained graphs, outer checkpoints, passes in flight, unused losses, two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.runtime.helpers import SMALL, Pair, case, gpt, lm_loss, rank, tokens, world
from tests.workers import Groups

TOKENS = 2 * 8 * 2  # tokens of one rank in one pass, times top-k
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"rematerialize": True, "reshard_interval": 1},
    {"dense": "replicate"},
    {"dense": "replicate", "rematerialize": True, "pools": "layer"},
)
CHECKPOINTED = replace(SMALL, checkpoint=True)


def _in_all_settings(act: Callable[[Pair], None], model: Callable[[], nn.Module] = gpt) -> None:
    for changes in SETTINGS:
        with case(changes):
            pair = Pair(model(), **changes)
            pair.warm_up(lm_loss(9))
            act(pair)


def _end_step(pair: Pair, passes: int) -> None:
    """Make an optimizer step and check that the loads are those of this number of passes."""
    for optimizer in pair.optimizers(lambda p: torch.optim.SGD(p, lr=0.1)):
        optimizer.step()
        optimizer.zero_grad()
    for layer in pair.engine.stats()["layers"]:
        assert layer["loads"].sum() == passes * TOKENS * world(), layer["loads"]


def _checkpointed() -> nn.Module:
    return gpt(CHECKPOINTED)


def _backwards(model: nn.Module, of: int, share: float) -> None:
    """Three backward passes through one graph."""
    output = model(*tokens(0, of))
    (output.lm_loss * share).backward(retain_graph=True)
    (output.aux_loss * share).backward(retain_graph=True)
    (output.logits.square().mean() * share).backward()


def _retained(pair: Pair) -> None:
    _backwards(pair.model, rank(), 1.0)
    for of in range(world()):
        _backwards(pair.plain, of, 1 / world())
    pair.check_gradients()
    _end_step(pair, passes=1)
    pair.backward(lm_loss(1))
    pair.check_gradients()
    pair.check_state()


def _retained_in_all_settings() -> None:
    for model in (gpt, _checkpointed, lambda: gpt(replace(CHECKPOINTED, use_reentrant=True))):
        _in_all_settings(_retained, model)


def test_three_backward_passes_of_one_graph(groups: Groups) -> None:
    groups(2).run(_retained_in_all_settings)


def _outer_loss(seed: int) -> Callable[[nn.Module, int], Tensor]:
    """The whole model in a reentrant checkpoint: the first forward pass has no gradients, the second is in backward."""

    def loss_of(model: nn.Module, of: int) -> Tensor:
        start = torch.zeros((), dtype=torch.float64, requires_grad=True)
        return checkpoint(lambda s: model(*tokens(seed, of)).loss + 0 * s, start, use_reentrant=True)

    return loss_of


def _outer(pair: Pair) -> None:
    for seed in range(3):
        pair.backward(_outer_loss(seed))
        pair.check_gradients()
        _end_step(pair, passes=1)
    pair.check_state()
    layer = pair.engine._engine.layers[0]
    assert layer.history.array().sum(axis=(1, 2)).tolist() == [TOKENS * world()] * 4
    assert any(entry["copies"] for entry in pair.engine.stats()["layers"])


def test_outer_reentrant_checkpoint(groups: Groups) -> None:
    groups(2).run(_in_all_settings, _outer)


def _three_in_flight(pair: Pair) -> None:
    """Backward passes in a different order than their forward passes, with an evaluation between them."""
    losses = [lm_loss(seed)(pair.model, rank()) for seed in range(3)]
    for seed in (1, 2, 0):
        losses[seed].backward()
        with torch.no_grad():
            pair.model(*tokens(60 + seed, rank()))
    for seed in range(3):
        pair.backward_plain(lm_loss(seed))
    pair.check_gradients()
    _end_step(pair, passes=3)


def _in_flight_in_all_settings() -> None:
    for model in (gpt, _checkpointed):
        _in_all_settings(_three_in_flight, model)


def test_passes_in_flight(groups: Groups) -> None:
    groups(2).run(_in_flight_in_all_settings)


def _dropped(pair: Pair) -> None:
    """The first, second or third of three losses is not used, as if a sample was skipped."""
    for dropped in range(3):
        kept = []
        for seed in range(3):
            loss = lm_loss(seed)(pair.model, rank())
            if seed != dropped:
                kept.append(loss)
                pair.backward_plain(lm_loss(seed))
        torch.stack(kept).sum().backward()
        pair.check_gradients()
        _end_step(pair, passes=2)
    pair.check_state()


def test_losses_dropped(groups: Groups) -> None:
    groups(2).run(_in_all_settings, _dropped)


def _distilled(first: Pair, second: Pair) -> None:
    """Two models, teacher and student, with one loss that trains both."""
    for of, models, share in [(rank(), (first.model, second.model), 1.0)] + [
        (r, (first.plain, second.plain), 1 / world()) for r in range(world())
    ]:
        one, two = (model(*tokens(0, of)) for model in models)
        (((one.logits - two.logits).square().mean() + one.loss + two.loss) * share).backward()
    for pair in (first, second):
        pair.check_gradients()
        _end_step(pair, passes=1)


def _nested(first: Pair, second: Pair) -> None:
    """A whole step of the second model between forward and backward of the first."""
    loss = lm_loss(1)(first.model, rank())
    second.backward(lm_loss(2))
    second.check_gradients()
    _end_step(second, passes=1)
    loss.backward()
    first.backward_plain(lm_loss(1))
    first.check_gradients()
    _end_step(first, passes=1)


def _two_models() -> None:
    for changes in SETTINGS:
        for act in (_distilled, _nested):
            with case(f"{act.__name__}, {changes}"):
                pairs = Pair(gpt(seed=1), **changes), Pair(gpt(seed=2), **changes)
                for pair in pairs:
                    pair.warm_up(lm_loss(9))
                act(*pairs)
                for pair in pairs:
                    pair.check_state()
                    assert pair.engine.stats()["step"] == 2


def test_two_models(groups: Groups) -> None:
    groups(2).run(_two_models)
