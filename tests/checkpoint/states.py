"""Whole states of runs: what they contain, and whether two are equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.runs import Run

Full = dict[str, Tensor]


def assert_equal(left: Full, right: Full) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def assert_close(left: Full, right: Full) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name} {text}"
        )


def assert_refused(run: Run, path: Path, match: str) -> None:
    """Assert that loading raises ValueError and leaves model, optimizer and planner unchanged."""
    before = everything(run)
    with pytest.raises(ValueError, match=match):
        run.engine.load(path, run.optimizer)
    after = everything(run)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def everything(run: Run) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in run.engine.full_state_dict().items()}
    for i, values in enumerate(run.optimizer.state.values()):
        state |= {f"state {i} {key}": value.clone() for key, value in values.items()}
    state["lr"] = torch.tensor([group["lr"] for group in run.optimizer.param_groups])
    state["step"] = torch.tensor(run.engine.stats()["step"])
    state["owners"] = torch.tensor(run.owners())
    return state


def assert_like(path: Path, other: Path) -> None:
    """Both checkpoints load and give the same state."""
    runs = Run(), Run()
    for run, where in zip(runs, (path, other), strict=True):
        run.engine.load(where, run.optimizer)
    left, right = map(everything, runs)
    assert all(torch.equal(value, right[name]) for name, value in left.items())
