"""The mixin with TRL's trainers on two processes: they train, save, and resume bit-identically."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.launch import run

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trains_and_resumes(tmp_path: Path, kind: str) -> None:
    output = run("tests.integrations.trl_runs", "--out", str(tmp_path), "--kind", kind)
    assert f"{kind} resumed bit-identically" in output
