"""A moving average of weights under FSSDP equals that of the plain model, also after experts changed owners."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.ema import ExpertAverage
from hecate.models.gpt import GPTMoE
from tests.checkpoint.runs import BALANCED, TINY
from tests.workers import Groups

DECAY = 0.8


def _pair(**changes: object) -> tuple[nn.Module, hecate.FSSDP]:
    """The plain model and one under FSSDP, float64, with routers that decide clearly."""
    torch.manual_seed(0)
    plain = GPTMoE(TINY).double()
    with torch.no_grad():
        for block in plain.blocks:
            block.moe.gate.weight.mul_(20)
    return plain, hecate.fully_shard(copy.deepcopy(plain), None, replace(BALANCED, **changes))


def _train(engine: hecate.FSSDP, plain: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    def batch(rank: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(100 * step + rank))
        return tokens[:, :-1], tokens[:, 1:]

    engine.model(*batch(dist.get_rank())).loss.backward()
    for rank in range(dist.get_world_size()):
        (plain(*batch(rank)).loss / dist.get_world_size()).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        whole = got[name].full_tensor() if hasattr(got[name], "full_tensor") else got[name]
        torch.testing.assert_close(whole, value, rtol=1e-9, atol=1e-12, msg=name)


def _averaged(dense: str) -> int:
    """Train; returns how many slots of this device got another expert."""
    plain, engine = _pair(dense=dense)
    average = ExpertAverage(engine, DECAY)
    expected = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (engine.model, plain)]
    moved: list[int] = []
    engine.on_reshard(lambda name, old, new: moved.append(int((old != new).sum())))
    for step in range(5):
        _train(engine, plain, optimizers, step)
        average.update()
        for name, p in plain.named_parameters():
            expected[name].lerp_(p.detach(), 1 - DECAY)
        if step == 2:
            kept = average.state_dict()
            _assert_close(kept, expected)
            average.update()  # undone by load_state_dict below
            average.load_state_dict(kept)
    own = engine.full_state_dict()
    with average.apply():
        _assert_close(engine.full_state_dict(), expected)
    assert all(torch.equal(value, own[name]) for name, value in engine.full_state_dict().items())
    return sum(moved)


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_equals_the_plain_models(groups: Groups, dense: str) -> None:
    assert sum(groups(2).run(_averaged, dense)) > 0


def _loaded(path: str) -> str:
    _, engine = _pair()
    average = ExpertAverage(engine, DECAY)
    engine.save(path)
    engine.load(path)
    with pytest.raises(RuntimeError) as raised:
        average.update()
    return str(raised.value)


def test_owners_that_a_checkpoint_brought_are_noticed(groups: Groups, tmp_path: Path) -> None:
    for message in groups(2).run(_loaded, str(tmp_path / "saved")):
        assert "call ExpertAverage.load_state_dict after it" in message


def _rows_told() -> list[tuple[str, list[int], list[int]]]:
    plain, engine = _pair()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (engine.model, plain)]
    told: list[tuple[str, list[int], list[int]]] = []
    handle = engine.on_reshard(lambda name, old, new: told.append((name, old.tolist(), new.tolist())))
    for step in range(3):
        _train(engine, plain, optimizers, step)
    assert told
    assert told[-1][2] == engine.pools[0].flat_rows().tolist()
    handle.remove()
    before = len(told)
    for step in range(3, 6):
        _train(engine, plain, optimizers, step)
    assert len(told) == before
    return told


def test_callbacks_are_told_all_rows(groups: Groups) -> None:
    ranks = groups(2).run(_rows_told)
    experts = TINY.num_experts * TINY.num_layers
    for (name, old, new), (other_name, other_old, other_new) in zip(*ranks, strict=True):
        assert name == other_name == "hecate_pool_0"
        for rows in (old + other_old, new + other_new):
            assert sorted(r for r in rows if r >= 0) == list(range(experts))
    assert any(np.not_equal(old, new).any() for _, old, new in ranks[0])


def test_bad_decay() -> None:
    engine = hecate.fully_shard(GPTMoE(TINY))
    with pytest.raises(ValueError, match=r"decay=1.5: must be a number in \[0, 1\]"):
        ExpertAverage(engine, 1.5)
