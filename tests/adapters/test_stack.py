"""`stack_experts`: lists of MLPs compute the same stacked, alone and under FSSDP, and keep their names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hecate
from hecate.ops.grouped import Groups as RowGroups
from tests.runtime.helpers import Pair, case
from tests.workers import Groups

WIDTH, EXPERTS = 8, 4


class Gated(nn.Module):
    """As in Mixtral, with biases and dropout."""

    def __init__(self, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, 16, bias=bias), nn.Linear(WIDTH, 16, bias=bias)
        self.w2 = nn.Linear(16, WIDTH, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.limit = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.dropout(F.silu(self.w1(x)).clamp(max=self.limit) * self.w3(x)))


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, WIDTH))


MLPS: dict[str, Callable[[], nn.Module]] = {
    "gated": Gated,
    "without bias": lambda: Gated(bias=False),
    "sequential": plain_mlp,
    "one matrix": lambda: nn.Linear(WIDTH, WIDTH),
}


def mlps(kind: str) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([MLPS[kind]().double() for _ in range(EXPERTS)])


def loop(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    output = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = (index == number).nonzero(as_tuple=True)
        output = output.index_add(0, token, expert(x[token]) * weights[token, place, None])
    return output


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, WIDTH, dtype=torch.float64, generator=generator)
    weights, index = torch.randn(7, EXPERTS, dtype=torch.float64, generator=generator).softmax(-1).topk(2)
    return x, index.masked_fill(weights < 0.2, -1), weights


@pytest.mark.parametrize("kind", MLPS)
def test_equals_the_loop_over_the_list(kind: str) -> None:
    given = mlps(kind).eval()
    experts = hecate.stack_experts(copy.deepcopy(given))
    x, index, weights = inputs()
    expected = loop(given, x, index, weights)
    expected.square().sum().backward()
    output = experts(x, index, weights)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in given[0].named_parameters():
        by_expert = [m.get_parameter(name).grad for m in given]
        grads = torch.stack([torch.zeros_like(parameter) if g is None else g for g in by_expert])
        torch.testing.assert_close(experts.get_parameter(name.replace(".", "_")).grad, grads, rtol=1e-11, atol=1e-12)


def test_dropout_inside_experts() -> None:
    """Half of the rows' hidden values are dropped in training, none in evaluation."""
    two = nn.ModuleList([nn.Sequential(nn.Linear(1, 1000), nn.Dropout(0.5)) for _ in range(2)])
    experts = hecate.stack_experts(two)
    hidden = experts.expert_mlp
    x, groups = torch.ones(4, 1), RowGroups.of([1, 3], torch.device("cpu"))
    weights = {kind: getattr(experts, kind) for kind in experts.expert_weights}
    assert 0.4 < float((hidden(x, groups, weights) == 0).double().mean()) < 0.6
    experts.eval()
    assert not (hidden(x, groups, weights) == 0).any()


@pytest.mark.parametrize("kind", MLPS)
def test_names_of_the_list_are_kept(kind: str) -> None:
    given, other = mlps(kind), mlps(kind)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    experts = nn.ModuleDict({"experts": hecate.stack_experts(other), "after": nn.Linear(2, 2)})
    expected = {f"experts.{name}": value for name, value in given.state_dict().items()}
    after = {f"after.{name}": value for name, value in experts["after"].state_dict().items()}
    assert list(experts.state_dict()) == [*expected, *after]
    experts.load_state_dict(expected | after)
    for name, value in experts.state_dict().items():
        assert torch.equal(value, (expected | after)[name])
    given.load_state_dict({n.removeprefix("experts."): v for n, v in experts.state_dict().items() if n in expected})
    del expected[next(iter(expected))]
    with pytest.raises(RuntimeError, match="Missing key"):
        experts.load_state_dict(expected | after)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.routers = nn.ModuleList([nn.Linear(WIDTH, EXPERTS).double() for _ in range(2)])
        self.layers = nn.ModuleList([hecate.stack_experts(mlps(kind)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for router, experts in zip(self.routers, self.layers, strict=True):
            weights, index = (4 * router(x)).softmax(-1).topk(2)
            x = x + experts(x, index, weights)
        return x


def _train() -> None:
    for kind in ("gated", "one matrix"):
        for changes in ({"reshard_interval": 1}, {"dense": "replicate", "rematerialize": True}):
            with case(f"{kind}, {changes}"):
                torch.manual_seed(1)
                pair = Pair(Model(kind), **changes)  # type: ignore[arg-type]
                pair.warm_up(lambda model, of: model(inputs(of)[0]).square().mean())
                optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2))
                for seed in range(2):
                    pair.backward(lambda model, of, seed=seed: model(inputs(10 * seed + of)[0]).square().mean())
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                pair.check_state(rtol=1e-8)
                assert list(pair.engine.full_state_dict()) == list(pair.plain.state_dict())
                changed = {n: v + 1 for n, v in pair.plain.state_dict().items() if n.startswith("layers.")}
                for model in pair.both:  # FSDP2 takes only DTensors for the rest
                    model.load_state_dict(changed, strict=False)
                pair.check_state()


def test_under_fssdp(groups: Groups) -> None:
    groups(2).run(_train)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model("gated")
    engine = hecate.fully_shard(model)
    engine.init_weights(seed=0)
    values = engine.full_state_dict()["layers.1.2.w1.weight"]
    assert 0.05 < float(values.abs().max()) <= WIDTH**-0.5
    plain = Model("gated")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.state_dict()["layers.1.2.w1.weight"], values)


def _changed(change: Callable[[nn.Module], Any]) -> nn.ModuleList:
    experts = mlps("gated")
    change(experts[2])
    return experts


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (nn.ModuleList(), "ModuleList of 0; must be"),
        (_changed(lambda m: setattr(m, "limit", 7.0)), r"attribute limit is 3.0 of MLP 0 and 7.0 of MLP 2"),
        (_changed(lambda m: setattr(m, "w1", nn.Linear(WIDTH, 8).double())), "the structure is Gated"),
        (_changed(lambda m: m.w2.requires_grad_(False)), r"w2.weight is .* and .*requires_grad=False of MLP 2"),
        (nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))]), "1.weight, 1.bias of MLP 0 .* an nn.Linear"),
        (nn.ModuleList([nn.GELU()]), "has no nn.Linear"),
        (_changed(lambda m: m.w1.register_forward_hook(print)), r"2.w1 \(Linear\) has hooks or a replaced forward"),
        (_changed(lambda m: m.register_forward_pre_hook(print)), r"stack_experts: 2 \(Gated\) has hooks"),
        (_changed(lambda m: setattr(m.w2, "forward", print)), r"2.w2 \(Linear\) has hooks or a replaced forward"),
    ],
)
def test_refusals(experts: nn.ModuleList, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hecate.stack_experts(experts)


class Reads(nn.Module):
    """An MLP that uses the weight of a linear layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up.weight)


def test_weights_that_are_read_are_named() -> None:
    experts = hecate.stack_experts(nn.ModuleList([Reads(), Reads()]))
    with pytest.raises(AttributeError, match="the MLP reads weight of an nn"):
        experts(torch.ones(1, WIDTH), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_the_refusal_of_a_list_names_it() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"experts": mlps("gated")})})
    with pytest.raises(ValueError, match=r"block.experts \(ModuleList of 4\) must be one module: hecate.stack_experts"):
        hecate.fully_shard(model)
