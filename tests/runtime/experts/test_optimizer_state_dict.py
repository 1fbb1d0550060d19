"""State dicts of optimizers: what they contain, and what is refused. tests/checkpoint tests resuming from them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hecate.runtime.experts.optimizer_states import BY_EXPERT
from hecate.values.local import local_tensor
from tests.checkpoint.plain import TOLERANCE, Plain, Way, assert_same
from tests.checkpoint.runs import Run, make_optimizer
from tests.workers import Groups

UP = "hecate_pool_0_up"


def position(run: Run, name: str = UP) -> int:
    """Index of a parameter in the state dict of an optimizer of all."""
    return [key for key, _ in run.model.named_parameters()].index(name)


def own_state(run: Run, name: str = UP) -> dict[str, Any]:
    return run.optimizer.state[run.model.get_parameter(name)]


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("no ValueError")


def by_layer_and_expert(way: Way) -> None:
    run, plain = way.run(), Plain(way)
    run.train(0, 3)
    plain.train(0, 3)
    kept = {key: value.clone() for key, value in own_state(run).items() if isinstance(value, Tensor)}
    state_dict = run.optimizer.state_dict()
    state = state_dict["state"][position(run)]
    assert state_dict["param_groups"][0][BY_EXPERT] is True
    layers = [plain.model.get_parameter(f"blocks.{n}.moe.experts.up") for n in range(3)]
    for key in ("exp_avg", "exp_avg_sq"):
        entry = state[key]
        assert isinstance(entry, DTensor)
        assert entry.shape == (3 * way.experts, 32, 16)
        whole = torch.cat([plain.optimizer.state[layer][key] for layer in layers])
        torch.testing.assert_close(entry.full_tensor(), whole, **TOLERANCE)
    assert float(state["step"]) == 3
    assert run.optimizer.param_groups[0][BY_EXPERT] is False
    assert own_state(run).keys() == plain.optimizer.state[layers[0]].keys()
    assert all(torch.equal(local_tensor(own_state(run)[key]), local_tensor(value)) for key, value in kept.items())


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("experts", [8, 5])
def test_one_tensor_in_the_order_of_layers_and_experts(groups: Groups, world_size: int, experts: int) -> None:
    groups(world_size).run(by_layer_and_expert, Way(experts=experts))


def in_order_on_one_rank() -> None:
    run = Way(pools="layer").run()
    run.loss(0).backward()
    run.optimizer.step()
    if dist.get_rank() == 0:
        assert run.optimizer.state_dict()["param_groups"][0][BY_EXPERT] is True


def test_nothing_is_sent_for_what_is_in_order(groups: Groups) -> None:
    groups(2).run(in_order_on_one_rank)


def loaded_before_it_is_known(folder: str, way: Way) -> None:
    """A new optimizer is loaded and saved before its first step, and again by one that loaded that."""
    run, plain = way.run(), Plain(way)
    run.train(0, 3)
    plain.train(0, 3)
    state = deepcopy(run.optimizer.state_dict())
    run.optimizer = make_optimizer(way.optimizer, run.model)
    run.optimizer.load_state_dict(state)
    again = run.optimizer.state_dict()["state"][position(run)]
    assert run.optimizer.param_groups[0][BY_EXPERT] is True
    assert torch.equal(again["exp_avg"], state["state"][position(run)]["exp_avg"])
    run.engine.save(folder, run.optimizer)
    assert run.optimizer.param_groups[0][BY_EXPERT] is False
    other = way.run(seed=9)
    other.train(20, 22)
    other.engine.load(folder, other.optimizer)
    for name in (UP, "hecate_pool_0_down"):
        entries = [r.optimizer.state_dict()["state"][position(r, name)] for r in (run, other)]
        assert torch.equal(entries[0]["exp_avg"].full_tensor(), entries[1]["exp_avg"].full_tensor())
    for trained in (run, other):
        trained.train(3, 5)
    plain.train(3, 5)
    assert_same(run, plain)
    assert_same(other, plain)


def test_optimizer_that_is_loaded_before_its_first_step(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(loaded_before_it_is_known, str(tmp_path), Way(experts=5))


def with_adagrad(way: Way) -> None:
    """It has state before its first step, in no order: all values are one."""
    run, plain = way.run(), Plain(way)
    for trained in (run, plain):
        trained.optimizer = torch.optim.Adagrad(trained.model.parameters(), lr=1e-2, initial_accumulator_value=0.1)
    run.train(0, 2)
    plain.train(0, 2)
    kept, expected = (deepcopy(run.model.state_dict()), deepcopy(run.optimizer.state_dict())), plain.snapshot()
    run.train(2, 4)
    plain.train(2, 4)
    run.model.load_state_dict(kept[0])
    run.optimizer.load_state_dict(kept[1])
    plain.restore(expected)
    run.train(4, 6)
    plain.train(4, 6)
    assert_same(run, plain)


def test_state_that_is_there_before_the_first_step(groups: Groups) -> None:
    groups(2).run(with_adagrad, Way())


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: it passes for an optimizer, but is none of torch's making."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.defaults, self.param_groups, self.state = inner.defaults, inner.param_groups, inner.state


def saved_through_a_wrapper(folder: str) -> None:
    run, other = Way().run(), Way().run(seed=9)
    run.train(0, 3)
    run.engine.save(folder, Wrapper(run.optimizer))
    other.engine.load(folder, Wrapper(other.optimizer))
    for trained in (run, other):
        trained.train(3, 5)
    state = run.engine.full_state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.engine.full_state_dict().items())


def test_wrapper_without_hooks(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(saved_through_a_wrapper, str(tmp_path / "saved"))


# What is refused.


def of_unknown_state() -> None:
    run = Way().run()
    run.train(0, 2)
    state = own_state(run)
    state["blocks"] = torch.zeros(7)
    assert f"optimizer state blocks of {UP} has local shape (7,)" in error_of(run.optimizer.state_dict)
    state["blocks"] = [torch.zeros(12)]
    assert f"optimizer state blocks of {UP} is a list; must be a number or a tensor" in error_of(
        run.optimizer.state_dict
    )
    state["blocks"] = (0.9, 3)
    run.optimizer.state_dict()
    if dist.get_rank() == 1:
        state["blocks"] = torch.zeros(7)
    for_all = error_of(run.optimizer.state_dict)
    assert "has local shape (7,)" in for_all
    state["blocks"] = torch.zeros(12) if dist.get_rank() == 0 else None
    assert f"optimizer state blocks of {UP} is not the same on rank 0 and rank 1" in error_of(run.optimizer.state_dict)


def test_state_of_unknown_order(groups: Groups) -> None:
    groups(2).run(of_unknown_state)


def of_rows() -> None:
    """State dicts that are made otherwise than by `optimizer.state_dict()` are not loaded in part."""
    run = Way().run()
    run.train(0, 2)
    state = deepcopy(run.optimizer.state_dict())
    by_hand = deepcopy(state)
    by_hand["state"][position(run)] = dict(own_state(run))
    by_hand["param_groups"][0][BY_EXPERT] = run.optimizer.param_groups[0][BY_EXPERT]
    run.train(2, 4)
    before = run.engine.full_state_dict()["blocks.0.moe.experts.up"]
    moments = run.optimizer.state_dict()["state"]
    assert "has rows of slots, whose experts may have moved since" in error_of(
        lambda: run.optimizer.load_state_dict(by_hand)
    )
    unmarked = deepcopy(state)
    del unmarked["param_groups"][0][BY_EXPERT]
    assert "comes with a parameter group that lacks 'hecate_by_expert'" in error_of(
        lambda: run.optimizer.load_state_dict(unmarked)
    )
    other = deepcopy(state)
    other["state"][position(run)]["exp_avg"] = torch.zeros(23, 32, 16)
    assert "has shape (23, 32, 16); must be (24, 32, 16), by (layer, expert)" in error_of(
        lambda: run.optimizer.load_state_dict(other)
    )
    for key, value in run.optimizer.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(value[name], moments[key][name])
    new = make_optimizer("AdamW", run.model)
    new.load_state_dict(unmarked)  # nobody looks at it yet
    run.loss(5).backward()
    assert "lacks 'hecate_by_expert', which tells its order" in error_of(new.step)
    assert "lacks 'hecate_by_expert', which tells its order" in error_of(lambda: run.engine.save("/nowhere", new))
    assert torch.equal(run.engine.full_state_dict()["blocks.0.moe.experts.up"], before)


def test_rows_are_refused(groups: Groups) -> None:
    groups(2).run(of_rows)


def test_one_device_keeps_state_of_any_shape() -> None:
    """There, experts never move."""
    run = Way().run()
    run.train(0, 2)
    own_state(run)["blocks"] = torch.arange(7.0)
    state = deepcopy(run.optimizer.state_dict())
    own_state(run)["blocks"] = torch.zeros(7)
    run.optimizer.load_state_dict(state)
    assert torch.equal(own_state(run)["blocks"], torch.arange(7.0).double())
