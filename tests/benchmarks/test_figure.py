"""`benchmarks.figure` draws what is committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.figure import draw

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "end_to_end.json"


def test_the_committed_result_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "steps.png"
    draw(json.loads(RESULT.read_text())["rows"], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
