"""A few cycles of the script that kills a run over and over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.jobs import write_text
from tests.faults.kill_cycles import KINDS, compare


@pytest.mark.long
def test_killed_run_ends_like_the_other(tmp_path: Path) -> None:
    kills, different = compare(write_text(tmp_path), cycles=len(KINDS), seed=1)
    assert {kill.kind for kill in kills} == set(KINDS)
    assert different == []
