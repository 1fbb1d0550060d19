"""In backward both exchanges are launched before own gradients are added."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from hecate.runtime.comms import Pending
from hecate.runtime.experts.pool import ExpertPool
from hecate.runtime.experts.reduction import Reduction
from tests.runtime.helpers import Pair, close, net, rank, square_loss
from tests.workers import Groups


def _reduction(events: list[str]) -> Reduction:
    wait, own, sums = (partial(events.append, name) for name in ("wait", "own", "sums"))
    return Reduction(Pending(wait), own, sums)


def test_own_gradients_are_added_once_and_sums_last() -> None:
    for early in (False, True):
        events: list[str] = []
        reduction = _reduction(events)
        if early:
            reduction.add_own()
            assert events == ["own"]
        reduction.finish()
        assert events == ["own", "wait", "sums"]


def test_a_discarded_reduction_adds_nothing() -> None:
    events: list[str] = []
    reduction = _reduction(events)
    reduction.discard()
    reduction.add_own()
    assert events == ["wait"]


def _events() -> list[str]:
    """What one backward pass of two layers does, in order."""
    pair = Pair(net((4, 4)), dense="replicate", memory_slots=1, calibrate="always")
    pair.warm_up(square_loss(9))
    events: list[str] = []
    transport = pair.engine._engine.comms.reductions
    add, reduce, send = ExpertPool.add_gradients, transport.reduce, dist.all_to_all_single

    def noted(name: str, call: Any) -> Any:
        def noting(*args: Any, **options: Any) -> Any:
            events.append(name)
            return call(*args, **options)

        return noting

    loss = square_loss(0)(pair.model, rank())
    with (
        patch.object(ExpertPool, "add_gradients", noted("add", add)),
        patch.object(transport, "reduce", noted("reduce", reduce)),
        patch.object(dist, "all_to_all_single", noted("send", send)),
    ):
        loss.backward()
    return events


def test_launches_come_first(groups: Groups) -> None:
    for events in groups(2).run(_events):
        assert "reduce" in events
        assert events.count("send") == 4  # there and back for each of two layers
        for at, event in enumerate(events):
            # Between the launch of a reduction and that of the rows' exchange, nothing is added.
            if event == "reduce":
                assert events[at + 1] == "send", events


def _without_experts() -> None:
    pair = Pair(net((2, 2)), dense="replicate")
    pair.backward(square_loss(0))
    pair.check_gradients()
    assert all(p.grad is not None for pool in pair.engine.pools for p in pool.parameters.values())
    norm = torch.nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.1)
    close("norm", pair.engine.clip_grad_norm_(0.1), norm)


def test_a_device_without_experts_has_gradients_too(groups: Groups) -> None:
    """Otherwise optimizers and norms, which communicate per parameter, would wait for it."""
    groups(3).run(_without_experts)
