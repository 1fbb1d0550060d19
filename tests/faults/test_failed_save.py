"""If a background save fails, that is reported at the next step, and the next checkpoint is written."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from hecate.checkpoint.history import latest
from hecate.train.checkpoints import Checkpoints
from hecate.train.loop import Trainer
from tests.faults.jobs import make_trainer, write_text
from tests.workers import Groups

STEPS = 6
POLL_SECONDS = 0.005


class Obstructed(Trainer):
    """When the first checkpoint is written, after step 2, a file is in the place of the checkpoints' folder."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.printed, self.seen = io.StringIO(), [""]

    def step(self) -> dict[str, Any]:
        self.seen.append(self.printed.getvalue())
        if self.position.step == 2:
            while not self.checkpoints._pending.done():  # type: ignore[union-attr]
                time.sleep(POLL_SECONDS)
        if self.position.step in (1, 3):
            dist.barrier()
            if dist.get_rank() == 0 and self.position.step == 1:
                self.folder.checkpoints.write_text("")
            elif dist.get_rank() == 0:
                self.folder.checkpoints.unlink()
            dist.barrier()
        return super().step()


def train_obstructed(root: str) -> list[str]:
    """Returns what was printed before each step."""
    trainer = make_trainer(Obstructed, root, "name=obstructed", f"steps={STEPS}", "save_interval=2")
    # One rank that knows is enough.
    known = Checkpoints.failed if dist.get_rank() == 0 else lambda self: False
    with redirect_stderr(trainer.printed), patch.object(Checkpoints, "failed", known):
        trainer.train()
    return [*trainer.seen, trainer.printed.getvalue()]


def test_failure_is_reported_at_the_next_step(groups: Groups, tmp_path: Path) -> None:
    write_text(tmp_path)
    printed, nothing = groups(2).run(train_obstructed, str(tmp_path))
    assert nothing == [""] * len(printed)
    assert printed[:4] == [""] * 4  # before step 3
    assert "checkpoint of step 2 could not be written, the one before is kept: " in printed[4]  # before step 4
    assert "Not a directory" in printed[4]
    assert printed[4:] == [printed[4]] * 4
    assert latest(tmp_path / "obstructed" / "checkpoints") == tmp_path / "obstructed" / "checkpoints" / "step-00000006"
