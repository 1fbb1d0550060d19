"""Foreseen loads decide which copies the next step makes, and never what it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hecate
from tests.runtime.helpers import WIDTH, Net, Pair, rank, world
from tests.workers import Groups

EXPERTS, TOKENS = 4, 12


def loss_of(model: torch.nn.Module, of_rank: int) -> torch.Tensor:
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(of_rank)).double()
    return model(x).square().mean()


def pair(**changes: Any) -> Pair:
    torch.manual_seed(0)
    return Pair(Net((EXPERTS, EXPERTS)).double(), **changes)


def recorded(both: Pair) -> list[torch.Tensor]:
    """The routing of this rank's tokens, from a forward pass of the plain model."""
    routing: list[torch.Tensor] = []
    hooks = [
        moe.gate.register_forward_hook(lambda module, args, out: routing.append(out.expert_index))
        for moe in both.plain.moes
    ]
    with torch.no_grad():
        loss_of(both.plain, rank())
    for hook in hooks:
        hook.remove()
    return routing


def ahead(both: Pair) -> list[np.ndarray]:
    """The placements that the step under way was planned with."""
    return [placement.matrix for placement in both.engine._engine._placements]


def foresees() -> None:
    # Without foresight the first step has no history, so it makes no copies ahead of the gate.
    both = pair(calibrate=False)
    routing = recorded(both)
    with torch.no_grad():
        loss_of(both.model, rank())  # a rollout begins the step, without copies
    assert all(matrix.sum() == EXPERTS for matrix in ahead(both))
    both.engine.foresee(routing)
    both.backward(loss_of)
    assert any(matrix.sum() > EXPERTS for matrix in ahead(both))
    both.check_gradients()
    after = [layer["imbalance_after"] for layer in both.engine.stats()["layers"]]
    assert max(after) < 1.05, after  # loads are known, slots suffice
    from_routing = ahead(both)
    torch.optim.SGD(both.model.parameters(), lr=0.0).step()

    # The same loads as counts lead to the same plan; a step under way keeps its own.
    counts = np.stack([layer["counts"] for layer in both.engine.stats()["layers"]])
    again = pair(calibrate=False)
    again.engine.foresee(counts)
    loss_of(again.model, rank()).backward()
    assert all(np.array_equal(a, b) for a, b in zip(from_routing, ahead(again), strict=True))
    again.engine.foresee(np.zeros_like(counts))
    assert all(np.array_equal(a, b) for a, b in zip(from_routing, ahead(again), strict=True))

    # Wrong foresight: the hottest expert is said to be another one. Gradients are the same.
    wrong = pair(calibrate=False)
    wrong.engine.foresee(counts[:, :, ::-1] * 1000)
    wrong.backward(loss_of)
    wrong.check_gradients()

    # After the step, plans come from the history again.
    torch.optim.SGD(wrong.model.parameters(), lr=0.0).step()
    wrong.model.zero_grad()
    loss_of(wrong.model, rank()).backward()
    plain = pair(calibrate=False)
    plain.warm_up(loss_of)
    loss_of(plain.model, rank()).backward()
    assert all(np.array_equal(a, b) for a, b in zip(ahead(wrong), ahead(plain), strict=True))


def refuses() -> None:
    both = pair()
    good = np.ones((2, world(), EXPERTS), dtype=np.int64)
    alone = rank() == 1  # an error of one rank is raised on all
    cases: list[tuple[Any, str]] = [
        (good[:1], "loads of 1 layers, must be those of the model's 2 MoE layers"),
        (good[:, :1], r"layer moes.0.experts: counts: shape \(1, 4\)"),
        (good.astype(float), "dtype float64"),
        (-good if alone else good, "-1 tokens of device 0 for expert 0, must be >= 0"),
        (good * 2 if alone else good, "counts is .* on rank 0 and .* on rank 1; all ranks must pass the same"),
        ([torch.ones(3, 2, dtype=torch.int64)] * 2 if alone else good, "what is passed is counts on rank 0"),
        ([torch.full((3, 2), EXPERTS)] * 2, r"routing from 4 to 4, must be in \[0, 4\)"),
        ([torch.ones(3, dtype=torch.int64)] * 2, r"routing has shape \(3,\)"),
        (7, "must be int"),
        (np.array(7), "must be int"),
        (torch.tensor(7), "must be int"),
        ([], "must be int"),
    ]
    for counts, words in cases:
        with pytest.raises(ValueError, match=f"FSSDP.foresee.*{words}"):
            both.engine.foresee(counts)
    both.backward(loss_of)  # nothing was changed
    both.check_gradients()
    assert isinstance(both.engine, hecate.FSSDP)


@pytest.mark.parametrize("check", [foresees, refuses])
def test_foresee(groups: Groups, check: Any) -> None:
    groups(2).run(check)
