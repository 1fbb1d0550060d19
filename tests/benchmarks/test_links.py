"""`benchmarks.links`: the profile that it writes, and that the runtime reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hecate.cost import CostModel
from tests.faults.jobs import own_environment


def test_a_profile_of_two_nodes(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.links", str(tmp_path / "cost.json"), "--nodes", "2", "--devices", "1"]
    where = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=where, env=own_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = CostModel.load(tmp_path / "cost.json")
    assert str(found) in done.stdout
    assert found.intra_node_bandwidth > 10**5
    assert found.flops > 10**6
    assert 0 <= found.hidden_permille <= 1000


def test_one_rank_has_no_links(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.links", str(tmp_path / "cost.json"), "--devices", "1"]
    where = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=where, env=own_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "one rank has no links; use at least 2" in done.stderr
    assert not (tmp_path / "cost.json").exists()
