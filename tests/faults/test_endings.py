"""If a job ends while it writes a checkpoint, the checkpoint is completed, or the old one kept and this reported."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import hecate
from hecate.models.gpt import GPTMoE
from tests.faults.endings import TINY
from tests.faults.jobs import own_environment
from tests.forked import Program, free_port

ROOT = Path(__file__).parents[2]


def run(path: Path, how: str) -> tuple[list[int], list[str]]:
    """The exit codes of both ranks, and what they printed to stderr."""
    port = str(free_port())
    words = [("-m", "tests.faults.endings", str(rank), port, str(path), how) for rank in range(2)]
    processes = [Program(given, ROOT, own_environment()) for given in words]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes], errors


def step_of(path: Path) -> int:
    """The step of the checkpoint in that folder. All weights are NaN before, so that each must be loaded."""
    engine = hecate.fully_shard(GPTMoE(TINY))
    optimizer = torch.optim.AdamW(engine.model.parameters())
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(float("nan"))
    engine.load(path, optimizer)
    assert not any(value.isnan().any() for value in engine.full_state_dict().values())
    return int(engine.stats()["step"])


@pytest.mark.parametrize(
    ("how", "code"),
    [("destroy", 0), ("destroy, then save", 0), ("nothing", 0), ("exit", 3), ("error", 1), ("Ctrl-C", -signal.SIGINT)],
)
def test_python_waits_for_it(tmp_path: Path, how: str, code: int) -> None:
    codes, errors = run(tmp_path / "checkpoint", how)
    assert codes == [code] * 2, errors
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    assert step_of(tmp_path / "checkpoint") == 2
    assert not any("is not in place" in error for error in errors)


def test_failure_that_nobody_waited_for(tmp_path: Path) -> None:
    codes, errors = run(tmp_path / "checkpoint", "cannot be written")
    assert codes == [1, 1]
    for error in errors:
        assert "checkpoint is not in place, the one before is kept: NotADirectoryError" in error
        assert str(tmp_path / "checkpoint" / "hecate.json" / "checkpoint") in error
    assert step_of(tmp_path / "checkpoint") == 1


def test_rank_that_dies(tmp_path: Path) -> None:
    codes, errors = run(tmp_path / "checkpoint", "the other dies")
    assert codes == [1, -signal.SIGKILL]
    assert "hecate: checkpoint " in errors[0]
    assert "checkpoint is not in place, the one before is kept: RuntimeError" in errors[0]
    assert step_of(tmp_path / "checkpoint") == 1
