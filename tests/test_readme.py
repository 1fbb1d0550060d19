"""The README: its Python runs, in one process and under torchrun, and the two commands come first.

Its links, commands and keys are checked with those of the other pages (tests/docs).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks

README = ROOT / "README.md"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


@pytest.mark.parametrize(("launcher", "devices"), [((), 1), (TORCHRUN, 2)], ids=["one process", "torchrun"])
def test_usage_trains_one_model(launcher: tuple[str, ...], devices: int, tmp_path: Path) -> None:
    (code,) = blocks(README, "python")
    assert "torchrun --nproc-per-node 8 train.py" in README.read_text()
    script = tmp_path / "train.py"
    script.write_text(f"{code}\nassert (1 if engine.mesh is None else engine.mesh.size()) == {devices}\n")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, *launcher, str(script)]
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt" / "step-3").is_dir()


def test_the_two_commands_are_there_and_short() -> None:
    (commands,) = (block for block in blocks(README, "bash") if "make train" in block)
    assert [line.split("#")[0].split() for line in commands.splitlines()] == [["make", "train"], ["make", "test"]]
    assert len(README.read_text().splitlines()) <= 120, "to be read in a minute; everything else is for docs/"
