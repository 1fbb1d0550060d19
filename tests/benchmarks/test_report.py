"""The one JSON format of all benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import Report


def test_rows_become_json_and_a_table(tmp_path: Path) -> None:
    report = Report()
    report.add("D=8", "ours", "imbalance", 1.25)
    report.add("D=8", "theirs", "imbalance", 1.5)
    report.add("D=16", "ours", "imbalance", 2)
    report.add("D=16", "ours", "time", 0.5, "ms")
    report.write(tmp_path / "new" / "out.json", "python -m benchmarks.x")
    content = json.loads((tmp_path / "new" / "out.json").read_text())
    assert sorted(content) == ["command", "machine", "rows", "versions"]
    assert content["command"] == "python -m benchmarks.x"
    assert content["rows"][3] == {"setting": "D=16", "subject": "ours", "metric": "time", "value": 0.5, "unit": "ms"}
    assert content["machine"]["cores"] >= 1
    assert "numpy" in content["versions"]
    head, _, first, second = report.table("imbalance").splitlines()
    assert head.split() == ["imbalance", "ours", "theirs"]
    assert first.split() == ["D=8", "1.25", "1.5"]
    assert second.split() == ["D=16", "2"]
