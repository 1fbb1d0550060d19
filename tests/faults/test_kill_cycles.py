"""Runs a few cycles of `kill_cycles`, and tests that it finds damaged checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from tests.faults.jobs import write_text
from tests.faults.kill_cycles import Cycle, Result, report, run_cycles
from tests.faults.wholeness import missing

TRAINER = ("kill", "ctrl-c")
"""The trainer treats SIGTERM as it does Ctrl-C, but for the exit code; the long test sends that, too."""


@pytest.mark.parametrize("how", [TRAINER, ("destroy", "destroy")], ids=["trainer", "script"])
def test_nothing_is_lost(tmp_path: Path, how: tuple[str, ...]) -> None:
    result = run_cycles(write_text(tmp_path), cycles=len(how), seed=1, how=how)
    assert [cycle.how for cycle in result.cycles] == list(how)
    assert result.good, report(result, seed=1)


@pytest.mark.long
def test_nothing_is_lost_in_many_cycles(tmp_path: Path) -> None:
    result = run_cycles(write_text(tmp_path), cycles=16, seed=2)
    assert result.good, report(result, seed=2)


def test_report_counts_by_way() -> None:
    cycles = (
        Cycle("kill", code=-9, step=7, kept=5, wrong=()),
        Cycle("ctrl-c", code=130, step=8, kept=8, wrong=()),
        Cycle("kill", code=1, step=9, kept=9, wrong=("something",)),
    )
    lines = report(Result(cycles, different=()), seed=3).splitlines()
    assert lines[1].split() == ["kill", "2", "1", "1.00", "2", "-9", "(1),", "1", "(1)"]
    assert lines[2].split() == ["ctrl-c", "1", "0", "0.00", "0", "130", "(1)"]
    assert lines[3].startswith("seed 3: NOT GOOD")
    assert Result(cycles[:2], different=()).good
    assert not Result(cycles[:2], different=("losses",)).good


def drop_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata["weight"].chunks.clear()  # type: ignore[union-attr]


def repeat_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata["weight"].chunks *= 2  # type: ignore[union-attr]


def drop_place(metadata: Metadata) -> None:
    metadata.storage_data.clear()


def move_place(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.offset += 10**6


def drop_all(metadata: Metadata) -> None:
    metadata.state_dict_metadata.clear()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop_chunk, "weight: 6 of 6 elements are not in one chunk"),
        (repeat_chunk, "weight: 6 of 6 elements are not in one chunk"),
        (drop_place, "weight: the chunk at (0, 0) is in no file"),
        (move_place, "weight: the chunk at (0, 0) is in no file"),
        (drop_all, "has no entry"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_half_checkpoints_are_noticed(tmp_path: Path, change: Callable[[Metadata], None], found: str) -> None:
    dcp.save({"weight": torch.ones(2, 3), "step": torch.tensor(3)}, checkpoint_id=tmp_path, no_dist=True)
    assert missing(tmp_path) == []
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    change(metadata)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert any(found in text for text in missing(tmp_path))
