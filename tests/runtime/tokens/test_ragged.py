"""Tokens with any number of experts from none to all (index -1: none), against a loop over experts in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from hecate.ops.grouped import Groups as RowGroups
from hecate.ops.grouped import grouped_linear
from hecate.ops.permute import combine, invert
from hecate.runtime.tokens import dispatch
from tests.ops.copies import permute
from tests.runtime.helpers import SLOW_NODES, Pair, case, devices_per_node, error_of, rank
from tests.workers import Groups

WIDTH, EXPERTS, TOKENS = 8, 5, 9


class LoopedExperts(nn.Module):
    """Experts whose plain forward pass is a loop that computes what it is asked for, and nothing else."""

    expert_weights = ("up", "down")

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 16, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 16))

    @staticmethod
    def expert_mlp(x: Tensor, groups: RowGroups, weights: Mapping[str, Tensor]) -> Tensor:
        return grouped_linear(grouped_linear(x, weights["up"], groups).tanh(), weights["down"], groups)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, place = (index == expert).nonzero(as_tuple=True)
            rows = (x[token] @ self.up[expert].T).tanh() @ self.down[expert].T
            output = output.index_add(0, token, rows * weights[token, place, None])
        return output


Choice = Callable[[Tensor], tuple[Tensor, Tensor]]


def top_p(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable experts that together have 60 %, so one or more."""
    weights, index = probabilities.sort(dim=-1, descending=True)
    return index.masked_fill(weights.cumsum(-1) - weights > 0.6, -1), weights


def expert_choice(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert takes two tokens, so a token has none to all experts."""
    chosen = torch.zeros_like(probabilities).scatter(0, probabilities.topk(2, dim=0).indices, 1.0).bool()
    return torch.where(chosen, torch.arange(EXPERTS), -1), probabilities


def dropping(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Top-2 with a capacity of three tokens an expert; what is dropped has a weight that must not be read."""
    weights, index = probabilities.topk(2)
    taken = torch.nn.functional.one_hot(index.flatten(), EXPERTS).cumsum(0).gather(1, index.view(-1, 1)).view_as(index)
    return index.masked_fill(taken > 3, -1), weights.masked_fill(taken > 3, float("nan"))


CHOICES: dict[str, Choice] = {c.__name__: c for c in (top_p, expert_choice, dropping)}


class Ragged(nn.Module):
    def __init__(self, choice: str) -> None:
        super().__init__()
        self.choice = choice
        self.routers = nn.ModuleList([nn.Linear(WIDTH, EXPERTS) for _ in range(2)])
        self.experts = nn.ModuleList([LoopedExperts() for _ in range(2)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        for router in self.routers:
            nn.init.normal_(router.weight, std=2.0)

    def forward(self, x: Tensor) -> Tensor:
        padding = x[:, 0] == 0
        for router, experts in zip(self.routers, self.experts, strict=True):
            index, weights = CHOICES[self.choice](router(x).softmax(-1))
            x = x + experts(x, index.masked_fill(padding[:, None], -1), weights)
        return x


def _input(seed: int, of: int) -> Tensor:
    """Tokens of one rank; the last third is padding, on rank 1 in seed 0 all."""
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * seed + of))
    x[(0 if (seed, of) == (0, 1) else 2 * TOKENS // 3) :, 0] = 0
    return x


def _loss(seed: int) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, of: model(_input(seed, of)).square().mean()


class Computed:
    """Counts the (token, expert) pairs that the plain model computes, by layer."""

    def __init__(self, model: nn.Module) -> None:
        self.pairs = [0] * len(model.experts)
        for layer, experts in enumerate(model.experts):
            experts.register_forward_pre_hook(partial(self._count, layer))

    def _count(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.pairs[layer] += int((args[1] >= 0).sum())

    def take(self) -> list[int]:
        pairs, self.pairs = self.pairs, [0] * len(self.pairs)
        return pairs


def _train(choice: str, **changes: Any) -> None:
    torch.manual_seed(0)
    pair = Pair(Ragged(choice).double(), **changes)
    optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2))
    computed = Computed(pair.plain)
    for seed in range(3):
        pair.backward(_loss(seed))
        pair.check_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert [int(layer["loads"].sum()) for layer in pair.engine.stats()["layers"]] == computed.take()
    pair.check_state(rtol=1e-8)


SETTINGS: tuple[dict[str, Any], ...] = (
    {"policy": "balanced", "reshard_interval": 1},
    {"policy": "hecate", "rematerialize": True},
    {"policy": "ep", "dense": "replicate"},
)


def _in_all_settings() -> None:
    for choice in CHOICES:
        for changes in SETTINGS:
            with case(f"{choice}, {changes}"):
                _train(choice, **changes)


def test_one_device(groups: Groups) -> None:
    groups(1).run(_train, "top_p")


def test_two_devices(groups: Groups) -> None:
    groups(2).run(_in_all_settings)


def _two_nodes() -> int:
    with devices_per_node(2), mock.patch.object(dispatch, "node_dispatch", wraps=dispatch.node_dispatch) as made:
        for choice in CHOICES:
            with case(choice):
                _train(choice, cost=SLOW_NODES)
    return made.call_count


def test_two_nodes(groups: Groups) -> None:
    assert min(groups(4).run(_two_nodes)) > 0


def _outside() -> str:
    pair = Pair(Ragged("top_p").double())
    with mock.patch.dict(CHOICES, top_p=lambda p: (torch.full((TOKENS, 1), -2 * (rank() == 1)), p[:, :1])):
        return error_of(lambda: pair.model(_input(1, rank())))


def test_other_negative_indices_are_refused(groups: Groups) -> None:
    for error in groups(2).run(_outside):
        assert "the router of rank 1 chose 6 experts outside [0, 5)" in error
        assert error.endswith("and -1 means none")


def test_order_without_some_copies() -> None:
    x, rows = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    order = torch.tensor([5, 0, 3, 1])
    inverse = invert(order, 6)
    assert inverse.tolist() == [1, 3, 4, 2, 4, 0]
    weights = torch.rand(3, 2, dtype=torch.float64)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    expected[order] = rows
    expected = (expected.view(3, 2, 4) * weights[:, :, None]).sum(1)
    assert torch.equal(combine(rows, weights, inverse), expected)
    assert torch.equal(permute(x, order, inverse, 2), x[order // 2])
    inputs = (x.requires_grad_(), rows.requires_grad_(), weights.requires_grad_())
    torch.autograd.gradcheck(
        lambda x, rows, weights: combine(rows + permute(x, order, inverse, 2), weights, inverse), inputs
    )
