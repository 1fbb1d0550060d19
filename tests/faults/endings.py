"""One rank of a job that ends while a checkpoint is written in the background: a script that tests start.

    python -m tests.faults.endings RANK PORT PATH HOW

A complete checkpoint of step 1 is written to PATH, then that of step 2 slowly in the background; meanwhile the script
ends in the way that HOW names.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import hecate
from hecate.checkpoint.writer import ProvingWriter
from hecate.models.gpt import GPTMoE
from hecate.models.transformer import ModelConfig

TINY = ModelConfig(vocab_size=31, d_model=16, num_layers=2, num_heads=2, num_experts=4, max_length=8)
SLOW_SECONDS = 0.5


def main(rank: int, port: int, path: Path, how: str) -> None:
    """See above."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    engine = hecate.fully_shard(GPTMoE(TINY))
    optimizer = torch.optim.AdamW(engine.model.parameters())
    train(engine, optimizer)
    engine.save(path, optimizer)
    train(engine, optimizer)
    begun = threading.Event()
    patch.object(ProvingWriter, "write_data", slowly(begun, rank if how == "the other dies" else None)).start()
    where = path if how != "cannot be written" else path / "hecate.json" / "checkpoint"
    handle = engine.save(where, optimizer, async_op=True)
    assert handle is not None
    if how != "cannot be written":
        begun.wait()
        assert not handle.done()
    end(how, lambda: engine.save(path, optimizer), handle)


def train(engine: hecate.FSSDP, optimizer: torch.optim.Optimizer) -> None:
    """Make one step."""
    tokens = torch.randint(31, (2, 9))
    engine.model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def slowly(begun: threading.Event, dies: int | None) -> Any:
    """A slowed-down `write_data`; if `dies` is 1, it kills this process before it writes."""
    write = ProvingWriter.write_data

    def write_data(*args: Any) -> Any:
        begun.set()
        time.sleep(SLOW_SECONDS)
        if dies == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)

    return write_data


def end(how: str, save: Callable[[], object], handle: Any) -> None:
    """End the script in the way `how`."""
    if how == "destroy":
        dist.destroy_process_group()
    elif how == "destroy, then save":
        dist.destroy_process_group()
        handle.wait()
        save()
    elif how == "exit":
        sys.exit(3)
    elif how == "error":
        raise ZeroDivisionError
    elif how == "Ctrl-C":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
