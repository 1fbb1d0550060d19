"""The state of any kind of optimizer moves with the experts, or is refused before the first row moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.models.gpt import GPTMoE
from hecate.values.local import local_tensor
from tests.checkpoint.runs import BALANCED, TINY
from tests.workers import Groups


class Slow(torch.optim.Optimizer):
    """An optimizer that wraps SGD and pulls weights towards an average that it keeps itself."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        super().__init__(self.base.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        self.base.step()
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", p.detach().clone())
            slow.lerp_(p.detach(), 0.5)
            p.copy_(slow)


class Flat(torch.optim.Optimizer):
    """An optimizer that keeps its momentum flattened, as blockwise optimizers do."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            flat = self.state[p].setdefault("flat", torch.zeros(local_tensor(p).numel(), dtype=p.dtype))
            flat.add_(local_tensor(p.grad).reshape(-1))
            local_tensor(p).sub_(flat.view_as(local_tensor(p)), alpha=0.1)


class Nested(Flat):
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].setdefault("past", []).append(p.grad.clone())


def _two(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(params, lr=0.05, momentum=0.9), torch.optim.Adam(params, lr=1e-3)]


MADE: dict[str, Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]] = {
    "wrapper": lambda params: [Slow(params)],
    "two over one pool": _two,
    "flat": lambda params: [Flat(params)],
    "nested": lambda params: [Nested(params)],
    "L-BFGS": lambda params: [torch.optim.LBFGS(params, lr=0.1, max_iter=2, history_size=2)],
}


def _batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(100 * step + rank))
    return tokens[:, :-1], tokens[:, 1:]


def _ways(made: str) -> str:
    """The message of the refusal, or "equal" if the result equals the plain model's after owners moved."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    plain = GPTMoE(TINY).double()
    with torch.no_grad():
        for block in plain.blocks:
            block.moe.gate.weight.mul_(20)
    engine = hecate.fully_shard(copy.deepcopy(plain), None, replace(BALANCED, reshard_interval=2, dense="replicate"))
    initial = [owners.copy() for owners in engine.pools[0].owners]
    mine, theirs = (MADE[made](list(m.parameters())) for m in (engine.model, plain))
    for step in range(5):

        def ours(step: int = step) -> Tensor:
            loss = engine.model(*_batch(step, dist.get_rank())).loss
            loss.backward()
            return loss.detach()

        try:
            if made == "L-BFGS":
                mine[0].step(ours)
                continue
            ours()
        except ValueError as error:
            assert all((a == b).all() for a, b in zip(initial, engine.pools[0].owners, strict=True))
            return str(error)
        for rank in range(world):
            (plain(*_batch(step, rank)).loss / world).backward()
        for optimizer in mine + theirs:
            optimizer.step()
        for model in (engine.model, plain):
            model.zero_grad()
    assert any((a != b).any() for a, b in zip(initial, engine.pools[0].owners, strict=True)), "nothing moved"
    for name, value in engine.full_state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-8, atol=1e-11, msg=name)
    return "equal"


@pytest.mark.parametrize("made", ["wrapper", "two over one pool"])
def test_state_moves_with_the_experts(groups: Groups, made: str) -> None:
    assert groups(2).run(_ways, made) == ["equal"] * 2


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("flat", "flat of hecate_pool_0_up of Flat has local shape"),
        ("nested", "past of hecate_pool_0_up of Nested is a list of tensors"),
        ("L-BFGS", "of LBFGS"),
    ],
)
def test_state_that_would_stay_behind_is_refused(groups: Groups, made: str, said: str) -> None:
    for message in groups(2).run(_ways, made):
        assert "re-sharding moves experts with their optimizer state" in message
        assert said in message
        assert "reshard_interval=0" in message
