"""Gradients of experts are averaged over replicas layer by layer, and all replicas launch the same collectives."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor, nn

from hecate.collectives.transport import Work
from hecate.runtime.step.passes import Passes
from hecate.runtime.step.replicas import ReplicaAverages
from tests.runtime.helpers import Pair, case, close, net, rank, square_loss
from tests.workers import Groups

MESH = (2, 1)  # two replicas, each on one device
LAYERS = (4, 4, 3)


def _pair(**changes: object) -> Pair:
    return Pair(net(LAYERS), mesh=MESH, dense="replicate", **changes)


def _grads(pair: Pair) -> list[bool]:
    return [p.grad is not None for pool in pair.engine.pools for p in pool.parameters.values()]


def _reach_different_layers() -> None:
    """Replica 0 runs one layer and replica 1 all; then both only one; then twice in one backward pass."""

    def unequal(model: nn.Module, of: int) -> Tensor:
        return square_loss(0, layers=1 if of == 0 else None)(model, of)

    def joint(model: nn.Module, of: int) -> Tensor:
        return square_loss(1, layers=2 - of)(model, of) + square_loss(2, layers=1 + 2 * of)(model, of)

    for changes in ({}, {"pools": "layer"}):
        for loss in (unequal, joint, square_loss(3)):
            with case(f"{changes}, {loss}"):
                pair = _pair(**changes)
                pair.backward(loss)
                pair.check_gradients()
                pair.backward(loss)  # added to the gradients that are there
                pair.check_gradients()
                assert all(_grads(pair))
    pair = _pair(pools="layer")
    pair.backward(square_loss(0, layers=1))
    pair.check_gradients()
    assert _grads(pair) == [True, True, *[False] * 4]


def test_replicas_that_reach_different_layers(groups: Groups) -> None:
    groups(2).run(_reach_different_layers)


def _without_sync() -> None:
    pair = _pair()
    with pair.engine.no_sync():
        pair.backward(square_loss(0))
        assert not any(_grads(pair))
        pair.backward(square_loss(1, layers=1))
    pair.backward(square_loss(2, layers=2))
    pair.check_gradients()
    assert not any(pool.unreduced for pool in pair.engine.pools)
    with pair.engine.no_sync():
        square_loss(3)(pair.model, rank()).backward()
    pair.engine.skip_step()
    pair.plain.zero_grad()
    pair.backward(square_loss(4))
    pair.check_gradients()


def test_no_sync_averages_later(groups: Groups) -> None:
    groups(2).run(_without_sync)


def _order(**changes: object) -> tuple[list[str], set[torch.dtype], Pair]:
    """What happens in a backward pass, in order; the dtypes of all-reduced gradients."""
    pair = _pair(**changes)
    events: list[str] = []
    dtypes = set()
    launch, gradients, finish = ReplicaAverages._all_reduce, Passes.after_expert_gradients, Passes._finish_backward

    def launched(self: ReplicaAverages, flat: Tensor) -> Work:
        dtypes.add(flat.dtype)
        events.append(f"launch {self._left}")
        return launch(self, flat)

    def computed(self: Passes, copies, grads) -> None:  # type: ignore[no-untyped-def]
        events.append(f"backward {copies.layer.index}")
        gradients(self, copies, grads)

    def finished(self: Passes) -> None:
        events.append("end")
        finish(self)

    with (
        patch.object(ReplicaAverages, "_all_reduce", launched),
        patch.object(Passes, "after_expert_gradients", computed),
        patch.object(Passes, "_finish_backward", finished),
    ):
        pair.backward(square_loss(0))
    return events, dtypes, pair


def _behind_the_backward_pass() -> list[str]:
    events, dtypes, pair = _order()
    assert dtypes == {torch.float64}
    pair.check_gradients()
    _, dtypes, pair = _order(reduce_dtype=torch.bfloat16)
    assert dtypes == {torch.bfloat16}
    pair.check_gradients(rtol=1e-2)
    return events


def test_a_layer_is_averaged_while_the_next_one_runs_backward(groups: Groups) -> None:
    for events in groups(2).run(_behind_the_backward_pass):
        assert events == ["backward 2", "backward 1", "launch 2", "backward 0", "launch 1", "end", "launch 0"]


def _small_gradients_in_bfloat16() -> None:
    """Only what a pass adds is rounded: a large gradient that is there already does not swallow it."""
    pair = _pair(reduce_dtype=torch.bfloat16)
    parameter = pair.engine.pools[0].parameters["up"]
    grad = pair.engine.pools[0].gradient("up")
    grad.fill_(1000.0)
    pair.backward(square_loss(0))
    added = grad - 1000.0
    pair.model.zero_grad()
    square_loss(0)(pair.model, rank()).backward()
    close("gradient", added, parameter.grad.to_local(), 1e-6)


def test_a_pass_does_not_round_what_earlier_ones_added(groups: Groups) -> None:
    groups(2).run(_small_gradients_in_bfloat16)
