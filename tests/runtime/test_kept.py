"""The policy "flexmoe": copies that stay between steps stay equal to their owners, whatever happens in between."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.ema import ExpertAverage
from hecate.models.gpt import GPTMoE
from hecate.values.local import local_tensor
from tests.bench import device
from tests.runtime.helpers import SMALL, config, tokens
from tests.workers import Groups

Engine = hecate.FSSDP
SLOTS = 2


def _engine(policy: str, seed: int = 0, **changes: Any) -> Engine:
    model = GPTMoE(SMALL)
    model.init_weights(seed=seed)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.gate.weight.mul_(40)  # skewed loads
    given = {"reshard_interval": 2, "memory_slots": SLOTS, "max_imbalance": 1.0} | changes
    return hecate.fully_shard(model.to(device()), config=config(policy, **given))


def _train(engine: Engine, optimizer: torch.optim.Optimizer, steps: range, micro_batches: int = 1) -> list[float]:
    """The loss, averaged over ranks, and the norm of the gradients of each step."""
    found = []
    for step in steps:
        for part in range(micro_batches):
            loss = engine.model(*tokens(step * micro_batches + part, dist.get_rank())).loss
            loss.backward()
        norm = engine.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        found += [float(mean) / dist.get_world_size(), float(norm)]
    return found


def _adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    up, rest = ([p for name, p in named if ("up" in name) is wanted] for wanted in (True, False))
    return torch.optim.AdamW([{"params": up, "weight_decay": 0.3}, {"params": rest}], lr=lr)


def _copies(engine: Engine) -> int:
    """Copies of all devices; also checks that all of this device's are equal to their owners' rows, state included."""
    number = 0
    for pool, kept in zip(engine.pools, engine._parts.kept, strict=True):
        number += sum(int(p.matrix.sum()) - p.num_experts for p in kept.placements)
        for kind, parameter in pool.parameters.items():
            assert kept.parameters[kind].requires_grad == parameter.requires_grad
            theirs, own = [(parameter, kept.parameters[kind])], kept._optimizers.get(kind)
            if own is not None and number:
                for key, value in own[0].state[parameter].items():
                    theirs.append((value, own[1].state[kept.parameters[kind]][key]))
            for of_owners, of_copies in theirs:
                if not of_owners.ndim:
                    assert torch.equal(of_owners, of_copies)
                    continue
                rows = _by_expert(pool.flat_rows(), local_tensor(of_owners.detach()))
                for expert, row in kept._rows().items():
                    torch.testing.assert_close(of_copies[row].detach(), rows[expert], rtol=1e-6, atol=1e-9)
                    assert bool(of_copies[row].any())
    return number


def _by_expert(flat: np.ndarray, rows: Tensor) -> dict[int, Tensor]:
    """Rows of all ranks by expert."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {int(e): row.clone() for e, row in zip(flat, rows, strict=True) if e >= 0})
    return {e: row for own in everyone for e, row in own.items()}


def trains_like_ep(rematerialize: bool, kind: str) -> None:
    runs: dict[str, Any] = {}
    for policy in ("ep", "flexmoe"):
        engine = _engine(policy, rematerialize=rematerialize)
        optimizer = (
            _adamw(engine.model) if kind == "adamw" else torch.optim.SGD(engine.model.parameters(), 0.1, momentum=0.9)
        )
        losses, placements = [], set()
        for step in range(9):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            losses += _train(engine, optimizer, range(step, step + 1), micro_batches=2)
            if policy == "flexmoe":
                _copies(engine)
                placements |= {tuple(kept.placements) for kept in engine._parts.kept}
        runs[policy] = losses
        if policy == "flexmoe":
            assert _copies(engine) > 0
            assert len(placements) > 2  # none, and several others
            stats = engine.stats()
            assert max(layer["copies"] for layer in stats["layers"]) <= SLOTS * dist.get_world_size()
            after, before = (
                np.mean([layer[f"imbalance_{when}"] for layer in stats["layers"]]) for when in ("after", "before")
            )
            assert after < before
            kept = engine._parts.kept[0]
            assert stats["memory_bytes"]["copies"] == kept.num_bytes > 0
            assert kept.num_bytes == SMALL.num_layers * SLOTS * _expert_bytes(engine)
        runs[f"{policy} memory"] = engine.stats()["memory_bytes"]
        runs[f"{policy} state"] = engine.full_state_dict()
        engine.close()
    assert runs["flexmoe"] == pytest.approx(runs["ep"], rel=1e-6)
    for name, value in runs["ep state"].items():
        torch.testing.assert_close(runs["flexmoe state"][name], value, rtol=1e-4, atol=1e-6)
    more = {k: v - runs["ep memory"][k] for k, v in runs["flexmoe memory"].items()}
    assert more["owned"] == 0
    assert more["gradients"] == more["copies"]
    moments = 2 if kind == "adamw" else 1
    assert 0 <= more["optimizer"] - moments * more["copies"] < 64  # and the number of steps


def _expert_bytes(engine: Engine) -> int:
    return sum(local_tensor(p)[0].nbytes for p in engine.pools[0].parameters.values())


class Pair:
    """The same model under "ep" and under "flexmoe", trained side by side."""

    def __init__(self) -> None:
        self.engines = {policy: _engine(policy) for policy in ("ep", "flexmoe")}
        self.optimizers = {policy: _adamw(engine.model) for policy, engine in self.engines.items()}
        self.flex, self._steps = self.engines["flexmoe"], iter(range(0, 200, 3))

    def train(self) -> None:
        """Three more steps of both, which must give the same."""
        first = next(self._steps)
        found = {p: _train(e, self.optimizers[p], range(first, first + 3)) for p, e in self.engines.items()}
        assert found["flexmoe"] == pytest.approx(found["ep"], rel=1e-6)

    def scale(self, factor: float) -> None:
        """Write to all parameters, behind everybody's back."""
        for engine in self.engines.values():
            with torch.no_grad():
                for parameter in engine.model.parameters():
                    local_tensor(parameter).mul_(factor)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def others_write(folder: str) -> None:
    """Copies that are out of step are dropped, and training goes on as under "ep"."""
    pair = Pair()
    averages_are_swapped(pair)
    pair.train()
    pair.scale(0.5)
    pair.train()
    state_dicts_are_loaded(pair)
    checkpoints_are_loaded(pair, folder)
    weights_change_before_the_step(pair)
    owners_are_loaded(pair, folder)
    pair.close()


def averages_are_swapped(pair: Pair) -> None:
    averages = {policy: ExpertAverage(engine, 0.5) for policy, engine in pair.engines.items()}

    def evaluated(policy: str) -> float:
        with averages[policy].apply(), torch.no_grad():
            return float(pair.engines[policy].model(*tokens(7, dist.get_rank())).loss)

    pair.train()
    assert _copies(pair.flex) > 0
    for average in averages.values():
        average.update()
    assert evaluated("flexmoe") == pytest.approx(evaluated("ep"), rel=1e-6)  # with averages in the owners' rows


def state_dicts_are_loaded(pair: Pair) -> None:
    for policy, engine in pair.engines.items():
        optimizer = pair.optimizers[policy]
        weights, state = copy.deepcopy(engine.model.state_dict()), copy.deepcopy(optimizer.state_dict())
        engine.model.load_state_dict({name: value * 0.9 for name, value in weights.items()})
        state["param_groups"][0]["lr"] = 3e-3
        optimizer.load_state_dict(state)
    assert _copies(pair.flex) == 0
    pair.train()
    pair.train()
    assert _copies(pair.flex) > 0


def checkpoints_are_loaded(pair: Pair, folder: str) -> None:
    engines, optimizers = pair.engines, pair.optimizers
    for policy, engine in engines.items():
        engine.save(f"{folder}/{policy}", optimizers[policy])
    pair.train()
    engines["flexmoe"].load(f"{folder}/ep", optimizers["flexmoe"])  # its entries are those of any other policy
    engines["ep"].load(f"{folder}/ep", optimizers["ep"])
    assert _copies(pair.flex) == 0
    pair.train()
    pair.train()
    engines["ep"].load(f"{folder}/flexmoe", optimizers["ep"])
    engines["flexmoe"].load(f"{folder}/flexmoe", optimizers["flexmoe"])
    pair.train()
    pair.train()
    assert _copies(pair.flex) > 0


def weights_change_before_the_step(pair: Pair) -> None:
    for engine in pair.engines.values():
        engine.model(*tokens(80, dist.get_rank())).loss.backward()
    pair.scale(0.9)
    for optimizer in pair.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    assert _copies(pair.flex) == 0
    pair.train()


def owners_are_loaded(pair: Pair, folder: str) -> None:
    moving = _engine("smartmoe")
    optimizer = _adamw(moving.model)
    _train(moving, optimizer, range(90, 95))
    owners = zip(moving.pools[0].owners, pair.flex.pools[0].owners, strict=True)
    assert any(not np.array_equal(now, first) for now, first in owners)
    moving.save(f"{folder}/moved", optimizer)
    moving.close()
    for policy, engine in pair.engines.items():
        engine.load(f"{folder}/moved", pair.optimizers[policy])
    pair.train()
    pair.train()


def refusals() -> list[str]:
    found = []
    engine = _engine("flexmoe")
    model = engine.model
    loss = model(*tokens(0, dist.get_rank())).loss
    loss.backward()

    class Halved(torch.optim.SGD):
        pass

    others: list[torch.optim.Optimizer] = [Halved(model.parameters(), 0.1), torch.optim.Rprop(model.parameters())]
    for other in others:
        with pytest.raises(ValueError, match="flexmoe") as error:
            other.step()
        found.append(str(error.value))
    engine.close()
    engine = _engine("flexmoe")
    optimizer = _adamw(engine.model)
    _train(engine, optimizer, range(3))
    assert _copies(engine) > 0
    for parameter in engine.model.parameters():
        local_tensor(parameter).data.mul_(0.9)  # not counted by PyTorch
    with pytest.raises(RuntimeError, match="flexmoe") as unseen:
        _train(engine, optimizer, range(3, 6))
    found.append(str(unseen.value))
    engine.close()
    with pytest.raises(ValueError, match="flexmoe") as error:
        _engine("flexmoe", param_dtype=torch.bfloat16, master_dtype=torch.float32)
    return [*found, str(error.value)]


@pytest.mark.parametrize(("rematerialize", "kind"), [(False, "adamw"), (True, "sgd")])
def test_copies_with_state_train_like_ep(groups: Groups, rematerialize: bool, kind: str) -> None:
    groups(3).run(trains_like_ep, rematerialize, kind)


def test_copies_are_dropped_when_others_write_to_the_owners(groups: Groups, tmp_path: Any) -> None:
    groups(3).run(others_write, str(tmp_path))


def test_what_would_drift_apart_is_refused(groups: Groups) -> None:
    for said in groups(3).run(refusals):
        assert "Halved may not update each element by itself; it must be one of torch.optim's Adam, AdamW" in said[0]
        assert "Rprop may not update" in said[1]
        assert "are not equal to their owners' any more; weights were written in a way that PyTorch" in said[2]
        assert "computes in param_dtype=torch.bfloat16, its master weights are torch.float32" in said[3]
