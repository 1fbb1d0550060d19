"""After kill -9 while one checkpoint replaces another, one of the two is there and loads."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.checkpoint.runs import Run
from tests.workers import PRELOADED


def keep_saving(path: str) -> None:
    """Checkpoint number n has n in every weight."""
    torch.set_num_threads(1)
    run = Run()
    for number in range(1_000_000):
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.fill_(number)
        run.engine.save(path)


LONG = pytest.mark.long


@pytest.mark.parametrize("milliseconds", [9, *(pytest.param(n, marks=LONG) for n in (1, 2, 4, 6, 13, 17, 23, 31))])
def test_kill_at_any_time(tmp_path: Path, milliseconds: int) -> None:
    path, context = tmp_path / "checkpoint", mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=keep_saving, args=(str(path),), daemon=True)
    process.start()
    while not path.exists():
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(milliseconds / 1000)
    process.kill()
    process.join()
    run = Run()
    for _ in range(2):  # the next save clears what the crash left
        run.engine.load(path)
        numbers = {
            float(v) for n, p in run.engine.full_state_dict().items() if n != "numbers" for v in (p.min(), p.max())
        }
        assert len(numbers) == 1, numbers
        run.engine.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
