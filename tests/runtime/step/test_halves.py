"""Tokens in two halves (`FSSDPConfig.token_halves`): trains as in one exchange, and each travels behind the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hecate.runtime.step import run
from hecate.runtime.tokens import direct
from hecate.runtime.tokens.by_node import NodeDispatch
from hecate.runtime.tokens.dispatch import dispatch_of
from hecate.runtime.tokens.halves import HalvedDispatch
from tests.runtime.helpers import Net, Pair, case, devices_per_node, floats, rank
from tests.runtime.tokens.exchanges import noted
from tests.workers import Groups

SETTINGS: tuple[dict[str, Any], ...] = (
    {"reshard_interval": 1},
    {"policy": "ep"},
    {"rematerialize": True},
    {"dense": "replicate", "rematerialize": True, "pools": "layer"},
    {"dense": "replicate", "wire_dtype": torch.float64},
)


class Checkpointed(nn.Module):
    """A net whose layers are recomputed."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.net, self.use_reentrant = Net(), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.first(x)
        for moe in self.net.moes:
            x = x + checkpoint(lambda x, moe=moe: moe(x)[0], x, use_reentrant=self.use_reentrant)
        return self.net.head(x)


def _loss(seed: int) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, of: model(floats(seed, of).to(next(model.parameters()).dtype)).square().mean()


def _train(model: nn.Module, **changes: Any) -> None:
    torch.manual_seed(0)
    pair = Pair(model.double(), **({"token_halves": True} | changes))
    pair.train(_loss)


def _trains(changes: dict[str, Any]) -> None:
    models: dict[str, Callable[[], nn.Module]] = {"plain": Net, "checkpoint": partial(Checkpointed, False)}
    if changes.get("dense") == "replicate":
        models["reentrant"] = partial(Checkpointed, True)
    for name, make in models.items():
        with case(f"{name}, {changes}"):
            _train(make(), **changes)


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_trains_as_in_one_process(groups: Groups, changes: dict[str, Any]) -> None:
    groups(2).run(_trains, changes)


def _over_nodes(by_node: bool) -> None:
    made = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        made.append(dispatch_of(*args, **kwargs))
        return made[-1]

    with (
        devices_per_node(2),
        patch("hecate.runtime.tokens.dispatch.node_exchange_pays", lambda *_: by_node),
        patch("hecate.runtime.step.recorder.dispatch_of", keep),
    ):
        _train(Net())
    assert {type(each) for each in made} == {NodeDispatch if by_node else HalvedDispatch}


def test_node_aware_exchange_is_not_halved(groups: Groups) -> None:
    for by_node in (False, True):
        groups(4).run(_over_nodes, by_node)


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Launches of exchanges, waits for them, experts forward and backward, and own gradients, in order."""
    events: list[str] = []
    experts = run._experts

    def noted_experts(*args: Any) -> Tensor:
        events.append("experts")
        out = experts(*args)
        if out.requires_grad:
            out.register_hook(lambda grad: events.append("experts backward"))
        return out

    with noted(events), patch.object(run, "_experts", noted_experts):
        yield events


FORWARD = ["launch", "launch", "wait", "experts", "launch", "wait", "experts", "launch", "wait", "wait"]
BACKWARD = ["launch", "launch", "wait", "experts backward", "launch", "wait"]
BACKWARD += ["experts backward", "reduce", "launch", "wait", "wait"]


def _order(kernels: str) -> tuple[list[str], list[str]]:
    dtype = torch.float32 if kernels == "hecate" else torch.float64
    pair = Pair(Net((4,)).to(dtype), kernels=kernels, token_halves=True)
    _loss(0)(pair.model, rank()).backward()
    with _noted() as events:
        loss = _loss(1)(pair.model, rank())
        forward = list(events)
        events.clear()
        gradients = pair.engine._engine.passes.gradients
        send = gradients.send
        with patch.object(gradients, "send", lambda *args: (events.append("reduce"), send(*args))):
            loss.backward()
    return forward, events


@pytest.mark.parametrize("kernels", ["torch", "hecate"])
def test_each_half_travels_behind_the_other(groups: Groups, kernels: str) -> None:
    assert groups(2).run(_order, kernels) == [(FORWARD, BACKWARD)] * 2


def _raises(fails_at: int) -> list[str]:
    """Every exchange is awaited if experts raise, and the next pass runs as if nothing had happened."""
    pair = Pair(Net((4,)).double(), token_halves=True)
    calls = 0
    experts = run._experts

    def failing(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise ZeroDivisionError
        return experts(*args)

    with _noted() as events, patch.object(run, "_experts", failing), pytest.raises(ZeroDivisionError):
        _loss(0)(pair.model, rank())
    seen = list(events)
    pair.engine.skip_step()
    pair.backward(_loss(1))
    pair.check_gradients()
    return seen


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_leaves_no_exchange_behind(groups: Groups, fails_at: int) -> None:
    for events in groups(2).run(_raises, fails_at):
        assert events.count("launch") == events.count("wait") == fails_at + 1


def _cannot_launch() -> list[str]:
    """The first half is awaited if the second one's launch raises."""
    pair = Pair(Net((4,)).double(), token_halves=True)
    with _noted() as events:
        launch = direct.Sending

        def failing(*args: Any) -> Any:
            if events:
                raise ZeroDivisionError
            return launch(*args)

        with patch.object(direct, "Sending", failing), pytest.raises(ZeroDivisionError):
            _loss(0)(pair.model, rank())
    return events


def test_a_failed_launch_leaves_no_exchange_behind(groups: Groups) -> None:
    assert groups(2).run(_cannot_launch) == [["launch", "wait"]] * 2
