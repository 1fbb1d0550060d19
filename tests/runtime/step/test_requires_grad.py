"""`requires_grad` may change at any time after sharding, as in the plain model: gradual freezing and unfreezing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.runtime.helpers import Pair, case, error_of, gpt, lm_loss, rank
from tests.workers import Groups

Choice = Callable[[str], bool]


def _is_expert(name: str) -> bool:
    return ".experts." in name or name.startswith("hecate_pool_")


def _is_down(name: str) -> bool:
    return name.endswith(("experts.down", "_down"))


CHOICES: dict[str, Choice] = {
    "everything": lambda name: True,
    "experts": _is_expert,
    "trunk": lambda name: not _is_expert(name),
    "one kind": lambda name: not _is_down(name),
    "head": lambda name: name.startswith("head"),
}


def _train_only(model: nn.Module, choice: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(CHOICES[choice](name))


def _phases(pair: Pair, choices: tuple[str, ...]) -> None:
    """Two steps per phase; one optimizer has all parameters, and its weight decay must not change frozen ones."""
    optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    for seed, choice in enumerate(c for c in choices for _ in range(2)):
        for model in pair.both:
            _train_only(model, choice)
        pair.backward(lm_loss(seed))
        pair.check_gradients()
        for parameter in pair.model.parameters():
            assert parameter.requires_grad or parameter.grad is None
        norm = pair.engine.clip_grad_norm_(0.3)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.3), rtol=1e-9, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pair.check_state(rtol=1e-8)
    assert pair.engine.stats()["step"] == 2 * len(choices)


def _schedules(dense: str) -> None:
    for choices in (("head", "trunk", "everything"), ("everything", "experts", "one kind"), ("everything", "trunk")):
        for changes in ({}, {"rematerialize": True, "pools": "layer"}):
            with case(f"{choices}, {changes}"):
                _phases(Pair(gpt(), dense=dense, **changes), choices)


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_frozen_and_unfrozen_in_phases(groups: Groups, dense: str) -> None:
    groups(2).run(_schedules, dense)


def _between_forward_and_backward(dense: str) -> None:
    """Freeze between forward and backward: the graph still computes the gradient, but a frozen leaf gets none."""
    pair = Pair(gpt(), dense=dense)
    pair.warm_up(lm_loss(9))
    loss = lm_loss(0)(pair.model, rank())
    for name, parameter in pair.model.named_parameters():
        if _is_down(name):
            parameter.requires_grad_(False)
    loss.backward()
    pair.backward_plain(lm_loss(0))
    for name, parameter in pair.plain.named_parameters():
        if _is_down(name):
            parameter.grad = None
    pair.check_gradients()
    assert all(p.grad is None for name, p in pair.model.named_parameters() if _is_down(name))


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_frozen_between_forward_and_backward(groups: Groups, dense: str) -> None:
    groups(2).run(_between_forward_and_backward, dense)


def _one_rank_freezes() -> str:
    pair = Pair(gpt(), dense="replicate")
    if rank() == 1:
        for name, parameter in pair.model.named_parameters():
            if _is_down(name):
                parameter.requires_grad_(False)
    return error_of(lambda: lm_loss(0)(pair.model, rank()))


def test_frozen_on_one_rank_only(groups: Groups) -> None:
    for message in groups(3).run(_one_rank_freezes):
        assert re.search(r"RuntimeError: blocks\.0\.moe\.experts: .*weight kinds 11 .* on rank 0 and ", message), (
            message
        )
        assert "weight kinds 1 after" in message
        assert "the same parameters frozen" in message
