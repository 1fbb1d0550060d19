"""Casts of owned rows are kept between the micro-batches of a step, and are never those of other weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor, nn

import hecate
from hecate.ema import ExpertAverage
from hecate.runtime.experts.casts import CastWatch
from hecate.runtime.experts.layer import LayerExperts
from hecate.values.local import local_tensor
from tests.bench import mesh_of
from tests.runtime.helpers import case, error_of, gpt, lm_loss, rank, settings
from tests.workers import Groups

LAYERS = 2
SGD = {"lr": 0.05, "momentum": 0.9}


class Run:
    """A model in float32 that computes in bfloat16. The first step is made already.

    Attributes:
        casts: how often a layer's owned rows were cast since then.
        losses: of all passes.
    """

    def __init__(self, mesh: tuple[int, ...] | None = None, **changes: object) -> None:
        self.model = gpt().float()
        changes = {"dense": "replicate", "param_dtype": torch.bfloat16} | changes
        self.engine = hecate.fully_shard(self.model, mesh_of(mesh), settings(**changes))
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        self.casts, self.losses, self.batch = 0, [], 0
        self.train(1)
        self.casts = 0

    def forward(self) -> Tensor:
        self.batch += 1
        loss = lm_loss(self.batch)(self.model, rank())
        self.losses.append(loss.item())
        return loss

    def evaluate(self) -> None:
        with torch.no_grad():
            self.forward()

    def train(self, micro_batches: int = 1, between: Callable[[Run], object] = lambda run: None) -> None:
        """One step."""
        for number in range(micro_batches):
            if number:
                between(self)
            self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[nn.Parameter]:
        return [p for pool in self.engine.pools for p in pool.parameters.values()]


# What may happen in a run, each with the number of casts that it takes per layer.


def accumulate(run: Run) -> int:
    for _ in range(2):
        run.train(4)
    return 2


def step_every_time(run: Run) -> int:
    for _ in range(3):
        run.train()
    return 3


def average_between_steps(run: Run) -> int:
    average = ExpertAverage(run.engine, 0.5)
    for _ in range(2):
        run.train(2)
        average.update()
        with average.apply():
            run.evaluate()
    run.train(2)
    return 2 + 2 + 1


def average_between_micro_batches(run: Run) -> int:
    average = ExpertAverage(run.engine, 0.0)

    def swap(run: Run) -> None:
        with average.apply():
            run.evaluate()

    run.train(3, swap)
    return 3 + 2


def data_between_micro_batches(run: Run) -> int:
    """`.data` is written for an evaluation, which no counter shows."""

    def swap(run: Run) -> None:
        for weight in run.weights():
            weight.data.mul_(2)
        run.evaluate()
        for weight in run.weights():
            weight.data.div_(2)

    run.train(3, swap)
    return 3 + 2


def steps_by_hand(run: Run) -> int:
    """Through `.data`, after an optimizer has made steps."""
    for _ in range(3):
        run.forward().backward()
        for p in run.model.parameters():
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=0.05)
        run.model.zero_grad()
    return 3


def load_between_micro_batches(run: Run) -> int:
    half = {name: value / 2 for name, value in run.model.state_dict().items()}
    run.train(3, lambda run: run.model.load_state_dict(half))
    return 3


def copy_between_micro_batches(run: Run) -> int:
    def halve(run: Run) -> None:
        with torch.no_grad():
            for weight in run.weights():
                weight.copy_(weight / 2)

    run.train(3, halve)
    return 3


def local_between_micro_batches(run: Run) -> int:
    run.train(3, lambda run: [local_tensor(weight).div_(2) for weight in run.weights()])
    return 3


def evaluate_before_backward(run: Run) -> int:
    run.forward().backward()
    loss = run.forward()
    run.evaluate()
    loss.backward()
    run.train(2)
    return 1 + 1 + 1 + 0


def two_forwards(run: Run) -> int:
    """The second pass cannot use what the first one still needs."""
    run.forward().backward()
    first, second = run.forward(), run.forward()
    second.backward()
    first.backward()
    run.train(2)
    return 2


def retained_graph(run: Run) -> int:
    """The memory of a graph that may run backward again is not written to."""
    run.forward().backward()
    loss = run.forward()
    loss.backward(retain_graph=True)
    run.forward().backward()
    loss.backward()
    run.train(2)
    return 2


def freeze_and_thaw(run: Run) -> int:
    def toggle(run: Run) -> None:
        run.weights()[0].requires_grad_(not run.weights()[0].requires_grad)

    run.train(4, toggle)
    run.train(4, toggle)
    return 2


def clear_between_micro_batches(run: Run) -> int:
    run.train(3, lambda run: run.optimizer.zero_grad())
    return 3


SCENES = {
    scene: {}
    for scene in (
        accumulate,
        step_every_time,
        average_between_steps,
        average_between_micro_batches,
        data_between_micro_batches,
        steps_by_hand,
        load_between_micro_batches,
        copy_between_micro_batches,
        local_between_micro_batches,
        evaluate_before_backward,
        two_forwards,
        retained_graph,
        freeze_and_thaw,
        clear_between_micro_batches,
    )
}


def _played(
    scene: Callable[[Run], int], never_kept: bool, **changes: object
) -> tuple[int, int, list[float], dict[str, Tensor]]:
    """Casts of a layer as expected and as counted, losses and weights."""
    with ExitStack() as stack:
        if never_kept:
            stack.enter_context(patch.object(CastWatch, "holds", lambda *_: False))
        run = Run(**changes)  # type: ignore[arg-type]
        cast = LayerExperts._cast

        def counted(layer: LayerExperts, copies: int) -> Tensor:
            run.casts += 1
            return cast(layer, copies)

        stack.enter_context(patch.object(LayerExperts, "_cast", counted))
        expected = scene(run)
        return LAYERS * expected, run.casts, run.losses, run.engine.full_state_dict()


def _scenes(scenes: dict[Callable[[Run], int], dict[str, object]]) -> None:
    for scene, changes in scenes.items():
        with case(f"{scene.__name__}, {changes}"):
            expected, casts, *kept = _played(scene, never_kept=False, **changes)
            assert casts == expected, (casts, expected)
            _, casts, *fresh = _played(scene, never_kept=True, **changes)
            assert casts >= expected
            assert kept[0] == fresh[0]
            assert all(torch.equal(kept[1][name], value) for name, value in fresh[1].items())


def test_kept_casts_change_nothing(groups: Groups) -> None:
    groups(2).run(_scenes, SCENES)


def _others() -> None:
    _scenes({accumulate: {"reshard_interval": 1}, two_forwards: {"dense": "fsdp"}})
    _scenes({accumulate: {"mesh": (2, 1)}, data_between_micro_batches: {"mesh": (2, 1)}})


def test_kept_casts_change_nothing_with_other_settings(groups: Groups) -> None:
    groups(2).run(_others)


def _memory() -> None:
    """What casts are kept in is the memory that copies and casts had anyway."""
    peaks = []
    for never_kept in (False, True):
        with ExitStack() as stack:
            if never_kept:
                stack.enter_context(patch.object(CastWatch, "holds", lambda *_: False))
            run = Run()
            for _ in range(3):
                run.train(3)
            peaks.append(run.engine._parts.copies_memory.peak)
    assert peaks[0] == peaks[1]


def test_kept_casts_take_no_more_memory(groups: Groups) -> None:
    groups(2).run(_memory)


def _debug() -> None:
    """The write that nothing shows: rank 1 alone writes, and all ranks raise."""
    os.environ["HECATE_DEBUG"] = "1"
    try:
        run = Run()
        run.train(3)
        run.forward().backward()
        if rank() == 1:
            for weight in run.weights():
                weight.data.mul_(2)
        error = error_of(run.forward)
        assert error.startswith("RuntimeError: blocks.0.moe.experts: its weights were written between"), error
    finally:
        del os.environ["HECATE_DEBUG"]


def test_debug_finds_writes_that_nothing_shows(groups: Groups) -> None:
    groups(2).run(_debug)
