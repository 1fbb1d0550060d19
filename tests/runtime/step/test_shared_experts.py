"""Shared experts run while tokens travel, forward and backward, with the results of the model's own order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hecate.models.moe import Experts, TopKGate
from tests.runtime.helpers import SLOW_NODES, WIDTH, Pair, case, devices_per_node, floats, rank
from tests.runtime.tokens.exchanges import noted
from tests.workers import Groups

Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
SETTINGS: tuple[dict[str, Any], ...] = (
    {"reshard_interval": 1},
    {"rematerialize": True},
    {"dense": "replicate", "rematerialize": True, "pools": "layer"},
)


class Branch(nn.Module):
    """The shared experts: notes when it runs forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.events: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.events.append("shared")
        out = self.down(self.up(x).tanh())
        if out.requires_grad:
            out.register_hook(lambda grad: self.events.append("shared backward"))
        return out


class Block(nn.Module):
    """As in transformers' DeepSeek-V3, and in other orders."""

    def __init__(self, order: str, experts: int = 4) -> None:
        super().__init__()
        self.order = order
        self.gate = TopKGate(WIDTH, experts, 2)
        self.experts = Experts(experts, WIDTH, 16)
        self.shared_experts = Branch()

    def forward(self, x: Tensor) -> Tensor:
        if self.order != "input of the block":
            x = x / x.norm(dim=-1, keepdim=True)
        flat = x if self.order == "same input" else x.view(-1, WIDTH)
        routing = self.gate(flat.clone())  # what it saves may be written to below
        if self.order == "before":
            first = self.shared_experts(x)
        routed = self.experts(flat, routing.expert_index, routing.weights).view_as(x)
        if self.order == "before":
            return routed + first
        if self.order == "in a checkpoint":
            return routed + checkpoint(self.shared_experts, x, use_reentrant=False)
        if self.order == "other input":
            return routed + self.shared_experts(x * 1)
        if self.order == "written between":
            with torch.no_grad():
                flat.mul_(2.0)
        return routed + self.shared_experts(x)


class Branched(nn.Module):
    """Blocks with residual connections; `run` calls each of them."""

    def __init__(self, order: str, run: Run | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(order) for _ in range(2)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        for block in self.blocks:
            nn.init.normal_(block.gate.weight, std=2.0)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        x = x if self.blocks[0].order == "same input" else x.view(2, -1, WIDTH)
        for block in self.blocks:
            x = x + (block(x) if self.run is None else self.run(block, x))
        return x


WAYS: dict[str, Run | None] = {
    "plainly": None,
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "checkpoint, reentrant": partial(checkpoint, use_reentrant=True),
}
EARLY = ("view", "same input")
LATE = ("before", "other input", "written between", "in a checkpoint")
NOT_UNDER_FSDP = "input of the block"  # FSDP2 makes it a view of what the block was called with


def _branched(order: str, way: str = "plainly") -> Branched:
    torch.manual_seed(0)
    return Branched(order, WAYS[way]).double()


def _loss(seed: int) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, of: model(floats(seed, of)).square().mean()


def _trains(orders: tuple[str, ...], ways: tuple[str, ...], changes: dict[str, Any]) -> None:
    for order in orders:
        for way in ways:
            if "reentrant" in way and "dense" not in changes:
                continue
            with case(f"{order}, {way}, {changes}"):
                Pair(_branched(order, way), **changes).train(_loss)


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_trains_as_in_one_process(groups: Groups, changes: dict[str, Any]) -> None:
    groups(2).run(_trains, EARLY, tuple(WAYS), changes)


def test_other_orders_train_as_in_one_process(groups: Groups) -> None:
    groups(2).run(_trains, (*LATE, NOT_UNDER_FSDP), ("plainly", "checkpoint"), SETTINGS[0])
    groups(2).run(_trains, (*LATE, NOT_UNDER_FSDP), tuple(WAYS), SETTINGS[2])


def _over_nodes() -> None:
    with devices_per_node(2):
        Pair(_branched("view"), cost=SLOW_NODES).train(_loss)


def test_trains_with_the_node_aware_exchange(groups: Groups) -> None:
    groups(4).run(_over_nodes)


@contextmanager
def _noted(model: nn.Module) -> Iterator[list[str]]:
    """What the first block does, in order: launches of exchanges, waits for them, and its shared experts."""
    events: list[str] = []
    model.blocks[0].shared_experts.events = events  # type: ignore[union-attr, index]
    with noted(events):
        yield events


def _order(order: str, way: str, changes: dict[str, Any]) -> list[list[str]]:
    """Of the second pass: events of a forward pass through one block, and of its backward pass."""
    model = _branched(order, way).to(torch.float32 if changes.get("kernels") == "hecate" else torch.float64)
    model.blocks = model.blocks[:1]
    pair = Pair(model, **changes)
    _loss(0)(pair.model, rank()).backward()
    with _noted(pair.model) as forward:
        loss = _loss(1)(pair.model, rank())
    with _noted(pair.model) as backward:
        loss.backward()
    return [forward, backward]


PLAIN = [
    ["launch", "wait", "launch", "wait", "shared"],
    ["shared backward", "launch", "wait", "launch", "wait"],
]
BESIDE = [
    ["launch", "shared", "wait", "launch", "wait"],
    ["launch", "wait", "launch", "shared backward", "wait"],
]


@pytest.mark.parametrize("order", EARLY)
@pytest.mark.parametrize("kernels", ["torch", "hecate"])
def test_runs_between_launch_and_wait(groups: Groups, order: str, kernels: str) -> None:
    assert groups(2).run(_order, order, "plainly", {"kernels": kernels}) == [BESIDE, BESIDE]


@pytest.mark.parametrize("order", LATE)
def test_other_orders_stay(groups: Groups, order: str) -> None:
    for forward, _ in groups(2).run(_order, order, "plainly", {}):
        where = ["shared", *PLAIN[0][:-1]] if order == "before" else PLAIN[0]
        if order == "written between":  # tried once in the second pass, and given up
            where = [*BESIDE[0], "shared"]
        assert forward == where


def _recomputed() -> list[str]:
    return _order("view", "checkpoint", {})[1]


def test_a_recomputation_has_the_order_of_the_forward_pass(groups: Groups) -> None:
    for events in groups(2).run(_recomputed):
        assert events[:3] == BESIDE[0][:3]
        assert events[-5:] == BESIDE[1]


def _late_after(change: str) -> list[str]:
    """Events of a third pass after something changed that the second one relied on."""
    model = _branched("view")
    model.blocks = model.blocks[:1]
    pair = Pair(model)
    for seed in (0, 1):
        pair.backward(_loss(seed))
    for each in pair.both:
        block = each.blocks[0]  # type: ignore[index, union-attr]
        if change == "hook":
            block.shared_experts.register_forward_hook(lambda module, args, output: output * 2)
        else:
            block.order = "other input"
    for seed in (2, 3):
        pair.backward(_loss(seed))
    pair.check_gradients()
    with _noted(pair.model) as events:
        _loss(4)(pair.model, rank())
    return events


@pytest.mark.parametrize("change", ["hook", "input"])
def test_changes_between_passes_are_noticed(groups: Groups, change: str) -> None:
    for events in groups(2).run(_late_after, change):
        assert events == PLAIN[0]


def _raises() -> list[str]:
    """The exchange is awaited if the shared experts raise, and the next pass runs as if nothing had happened."""
    pair = Pair(_branched("view"))
    _loss(0)(pair.model, rank()).backward()
    pair.model.zero_grad()
    branch = pair.model.blocks[0].shared_experts  # type: ignore[index, union-attr]
    failing = patch.object(branch.up, "forward", side_effect=ZeroDivisionError)
    with _noted(pair.model) as events, failing, pytest.raises(ZeroDivisionError):
        _loss(1)(pair.model, rank())
    seen = list(events)
    pair.engine.skip_step()
    pair.backward(_loss(2))
    pair.check_gradients()
    return seen


def test_an_error_leaves_no_exchange_behind(groups: Groups) -> None:
    assert groups(2).run(_raises) == [["launch", "shared", "wait"]] * 2


def _swapped() -> None:
    """The shared experts, called on the same tensor with other weights, compute with those."""
    pair = Pair(_branched("same input"), dense="replicate")
    pair.backward(_loss(0))
    others = {name: torch.full_like(p, 0.1) for name, p in Branch().double().named_parameters()}
    for each in pair.both:
        for block in each.blocks:  # type: ignore[union-attr]
            block.experts.register_forward_hook(
                _adding(partial(torch.func.functional_call, block.shared_experts, others))
            )
    for seed in (1, 2):
        pair.backward(_loss(seed))
    pair.check_gradients()


def test_other_weights_are_noticed(groups: Groups) -> None:
    groups(2).run(_swapped)


def _copied() -> None:
    """A copy of the shared experts with other weights, called on the same tensor, computes its own output."""
    pair = Pair(_branched("same input"), dense="replicate")
    for each in pair.both:
        for block in each.blocks:  # type: ignore[union-attr]
            own = block.shared_experts
            other = copy.copy(own)
            other._modules = dict(own._modules)
            other.down = nn.Linear(12, WIDTH).double().requires_grad_(False)
            nn.init.constant_(other.down.weight, 0.1)
            nn.init.zeros_(other.down.bias)
            block.experts.register_forward_hook(_adding(other))
    for seed in range(3):
        pair.backward(_loss(seed))
    pair.check_gradients()


def _adding(other: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A hook of an experts module that adds what `other` makes of its input, before the shared experts are called."""
    return lambda module, args, output: output + other(args[0])


def test_a_copy_computes_its_own_output(groups: Groups) -> None:
    groups(2).run(_copied)
