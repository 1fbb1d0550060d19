"""FSSDPTrainer on two processes: it resumes bit-identically, and loads the best model at the end."""

from __future__ import annotations

from pathlib import Path

from tests.examples.launch import run


def test_resumes_and_loads_the_best(tmp_path: Path) -> None:
    output = run("tests.integrations.resumes", "--out", str(tmp_path))
    assert "resumed bit-identically" in output
    assert "loaded the best model" in output
