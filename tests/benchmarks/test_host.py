"""`benchmarks.host`: a short run measures every part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.host import PARTS
from tests.faults.jobs import own_environment


def test_measures_every_part(tmp_path: Path) -> None:
    options = ["--json", str(tmp_path / "out.json"), "--rounds", "1", "--passes", "1", "--settings", "4x8"]
    words = [sys.executable, "-m", "benchmarks.host", *options]
    done = subprocess.run(
        words, cwd=Path(__file__).parents[2], env=own_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["metric"]: row["value"] > 0 for row in rows} == dict.fromkeys(PARTS, True)
