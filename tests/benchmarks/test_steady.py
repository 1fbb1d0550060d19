"""`benchmarks.steady`: numbers that CPUs compute with slowly become 0."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
from benchmarks.steady import steady
small = torch.full((64, 64), 1e-30)
print((small * 1e-9).count_nonzero().item())
steady()
print((small * 1e-9).count_nonzero().item(), torch.mm(small, small.mul(1e-9)).count_nonzero().item())
"""


def test_steady_takes_the_smallest_numbers_for_zero() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["4096", "0", "0"]
