"""`benchmarks.steps`: its routers, and a short run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.steps import even, zipf
from hecate.models import TopKGate
from tests.faults.jobs import own_environment, write_text

TINY = ("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.max_length=32", "fssdp.calibrate=always")


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_routers(top_k: int) -> None:
    torch.manual_seed(0)
    gate = TopKGate(d_model=4, num_experts=5, top_k=top_k)
    alike, skewed = even(gate, 0, 50), zipf(gate, 0, 500)
    assert alike.flatten().bincount().tolist() == [10 * top_k] * 5
    for picks in (alike, skewed):
        assert all(len(set(row)) == top_k for row in picks.tolist())
    loads = skewed.flatten().bincount(minlength=5)
    assert (loads.max() > 1.5 * loads.float().mean()) == (top_k < 3)
    assert top_k == 5 or not torch.equal(zipf(gate, 1, 500).flatten().bincount().argsort(), loads.argsort())


def test_policies_side_by_side(tmp_path: Path) -> None:
    text = write_text(tmp_path) / "text"
    policies = "ep,balanced,balanced:reshard_interval=3"
    options = ["--json", str(tmp_path / "out.json"), "--rounds", "2", "--policies", policies]
    words = [sys.executable, "-m", "benchmarks.steps", *options, f"data.path={text}", *TINY]
    done = subprocess.run(
        words, cwd=Path(__file__).parents[2], env=own_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step time / ceiling" in done.stdout
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    found = {(row["setting"].split(",")[0], row["subject"], row["metric"]): row["value"] for row in rows}
    moved = found["Zipf 1.2 router", "balanced:reshard_interval=3", "imbalance_before"]
    assert moved < found["Zipf 1.2 router", "balanced", "imbalance_before"]
    assert found["even router", "balanced", "copies"] == 0
    for router in ("router's own choice", "Zipf 1.2 router"):
        assert found[router, "ep", "step time / ep"] == 1
        assert found[router, "ep", "copies"] == 0 < found[router, "balanced", "copies"]
        assert found[router, "balanced", "imbalance_after"] < found[router, "ep", "imbalance_after"]
        assert found[router, "balanced", "step time / ceiling"] > 0
