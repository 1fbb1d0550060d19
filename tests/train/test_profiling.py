"""`profile=steps:A-B`: what it accepts, and that the trace has the steps and labels that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hecate.labels import label
from hecate.report.spans import read_spans
from hecate.train.__main__ import _quoted
from hecate.train.profiling import Profiler, ProfileSteps
from hecate.train.settings import Settings
from tests.train.configs import config


def test_steps_and_ranks_are_read() -> None:
    assert ProfileSteps.parse("steps:10-12", 12) == ProfileSteps(10, 12, False)
    assert ProfileSteps.parse("steps:1-1,all", 12) == ProfileSteps(1, 1, True)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("steps:10", "must be steps:FIRST-LAST or steps:FIRST-LAST,all"),
        ("steps:10-12,every", "must be steps:FIRST-LAST or steps:FIRST-LAST,all"),
        ("steps:0-2", "the first >= 1 and the last <= steps=900"),
        ("steps:3-2", "must be steps in order"),
        ("steps:899-901", "the last <= steps=900"),
    ],
)
def test_other_values_are_refused_before_the_launch(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"profile='{text}': .*{rule}"):
        Settings.from_config(config(f"profile='{text}'"))


def test_all_needs_no_quotes_on_the_command_line() -> None:
    assert config(_quoted("profile=steps:10-12,all"))["profile"] == "steps:10-12,all"
    assert config("profile=steps:10-12")["profile"] == "steps:10-12"
    for argument in ("name=steps:10-12,all", "profile=steps:1-2", "profile='steps:1-2,all'"):
        assert "'steps:10" not in _quoted(argument)


@pytest.mark.parametrize(("everywhere", "rank", "written"), [(False, 0, True), (False, 1, False), (True, 1, True)])
def test_the_trace_has_the_steps_and_their_labels(tmp_path: Path, everywhere: bool, rank: int, written: bool) -> None:
    said: list[str] = []
    with Profiler(ProfileSteps(2, 3, everywhere), tmp_path, rank, torch.device("cpu"), said.append) as profiler:
        for number in range(1, 5):
            with profiler.step(number), label("gather", f"in {number}"):
                pass
    path = tmp_path / f"rank{rank}.steps2-3.json.gz"
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if written else [])
    assert said == ([f"profile of steps 2 to 3: {path}"] if written else [])
    if written:
        spans = [(span["rank"], span["verb"], span["of"]) for span in read_spans(path)]
        assert spans == [(rank, verb, of) for n in (2, 3) for verb, of in (("step", f"{n}"), ("gather", f"in {n}"))]


def test_a_run_that_ends_early_leaves_no_trace(tmp_path: Path) -> None:
    with Profiler(ProfileSteps(1, 3, False), tmp_path, 0, torch.device("cpu"), print) as profiler, profiler.step(1):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    said: list[str] = []
    with Profiler(ProfileSteps(1, 1, False), tmp_path / "taken", 0, torch.device("cpu"), said.append) as profiler:
        for number in (1, 2):
            with profiler.step(number):
                pass
    assert said == [f"{tmp_path / 'taken' / 'rank0.steps1-1.json.gz'}: cannot be written (File exists)"]
