"""Runs a program of several processes."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.workers import free_port


def run(module: str, *arguments: str, processes: int = 2) -> str:
    """Output of `python -m module arguments`, under torchrun where there is more than one process."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1"]
    launcher += [f"--master-port={free_port()}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
