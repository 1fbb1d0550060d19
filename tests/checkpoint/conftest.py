"""A checkpoint to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.runs import Run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one device, after 2 steps."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    run = Run()
    run.train(0, 2)
    run.engine.save(path, run.optimizer)
    return path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))
