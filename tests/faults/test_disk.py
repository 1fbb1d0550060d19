"""A full disk, a read-only disk, or a damaged file is an error on all ranks, and existing checkpoints are kept."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.checkpoint.history import latest
from hecate.train.checkpoints import Position
from hecate.train.loggers import read_metrics
from hecate.train.loop import Trainer
from tests.checkpoint.runs import Run
from tests.faults.jobs import command, make_trainer, write_text
from tests.workers import Groups

Full = dict[str, Tensor]
LEFT = 64 << 10
"""Bytes that are free on the "full" disk; less than a checkpoint needs."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small separate file system."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def set_read_only(disk: Path, yes: bool) -> None:
    subprocess.run(["mount", "-o", f"remount,{'ro' if yes else 'rw'}", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Fill the disk up to `LEFT` free bytes, on rank 0; the others wait."""
    if dist.get_rank() == 0:
        free = os.statvfs(disk)
        (disk / "filling").write_bytes(bytes(free.f_bavail * free.f_frsize - LEFT))
    dist.barrier()


def save_fill_save(disk: str, in_background: bool) -> tuple[str, Full, list[float]]:
    """The error of the second save, the content of the first checkpoint, and the losses of the following steps."""
    run = Run()
    run.train(0, 1)
    run.engine.save(Path(disk) / "checkpoint", run.optimizer)
    first = run.engine.full_state_dict()
    fill(Path(disk))
    with pytest.raises(OSError, match="No space left on device") as error:
        save(run, disk, in_background)
    return str(error.value), first, run.train(1, 3)


def save(run: Run, disk: str, in_background: bool) -> None:
    handle = run.engine.save(Path(disk) / "checkpoint", run.optimizer, async_op=in_background)
    if handle is not None:
        handle.wait()


def undisturbed() -> list[float]:
    return Run().train(0, 3)[1:]


def loaded(disk: str) -> Full:
    run = Run(seed=7)
    run.engine.load(Path(disk) / "checkpoint", run.optimizer)
    return run.engine.full_state_dict()


@pytest.mark.parametrize("in_background", [False, True])
def test_full_disk(groups: Groups, disk: Path, in_background: bool) -> None:
    ranks = groups(2).run(save_fill_save, str(disk), in_background)
    (disk / "filling").unlink()
    assert [p.name for p in disk.iterdir()] == ["checkpoint"]
    found = groups(2).run(loaded, str(disk))
    for (message, first, losses), state, expected in zip(ranks, found, groups(2).run(undisturbed), strict=True):
        assert message == ranks[0][0]
        assert "FSSDP.save" in message
        assert losses == expected
        assert all(torch.equal(value, state[name]) for name, value in first.items())


class Filling(Trainer):
    """Fills the disk after step 3."""

    def step(self) -> dict[str, Any]:
        if self.position.step == 3:
            self.checkpoints.finish()  # that of step 2, which must not need what is filled
            fill(self.folder.path.parents[0])
        return super().step()


def train_until_full(disk: str) -> tuple[str, str]:
    """The error of the last save, and what was printed, also about earlier saves."""
    trainer = make_trainer(Filling, disk, "name=full", "steps=7", "save_interval=2", "save_keep=1")
    printed = io.StringIO()
    size = r"No space left on device.*; a checkpoint of this run takes about [\d.]+ MiB"
    with pytest.raises(OSError, match=size) as error, redirect_stderr(printed), redirect_stdout(printed):
        trainer.train()
    return str(error.value), printed.getvalue()


def test_trainer_goes_on_with_a_full_disk(groups: Groups, disk: Path) -> None:
    write_text(disk)
    (message, printed), (other, nothing) = groups(2).run(train_until_full, str(disk))
    assert message == other
    for step in (4, 6):
        assert f"checkpoint of step {step} could not be written, the one before is kept: " in printed
    assert nothing == ""
    assert "validation bits per byte" in printed
    assert not (disk / "full" / "summary.json").exists()  # another start makes the checkpoint that is missing
    assert [m["step"] for m in read_metrics(disk / "full" / "metrics.jsonl")] == list(range(1, 8))
    (disk / "filling").unlink()
    assert latest(disk / "full" / "checkpoints") == disk / "full" / "checkpoints" / "step-00000002"


def resume_from_damaged(folder: str) -> tuple[Position, str]:
    """The step at which a run resumes if the newest checkpoint is damaged, and the error if both are."""
    run = make_trainer(Trainer, folder, "name=damaged", "steps=4", "save_interval=2")
    run.train()
    position = damage_and_resume(folder, "step-00000004").position
    with pytest.raises(ValueError, match="all checkpoints are damaged") as error:
        damage_and_resume(folder, "step-00000002")
    return position, str(error.value)


def damage_and_resume(folder: str, name: str) -> Trainer:
    run = make_trainer(Trainer, folder, "name=again", "steps=4", "save_interval=2")
    run.checkpoints._folder = Path(folder) / "damaged" / "checkpoints"
    if dist.get_rank() == 0:
        path = run.checkpoints._folder / name / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    run.resume()
    return run


def test_trainer_passes_damaged_checkpoints_over(groups: Groups, tmp_path: Path) -> None:
    write_text(tmp_path)
    for position, error in groups(2).run(resume_from_damaged, str(tmp_path)):
        assert position == Position(step=2, sequences=2 * 2 * 4)
        assert "(step-00000002, step-00000004); overwrite=true drops them" in error


def error_of_save(disk: str, in_background: bool) -> str:
    run = Run()
    with pytest.raises(OSError, match="Read-only file system") as error:
        save(run, disk, in_background)
    return str(error.value)


@pytest.mark.parametrize("in_background", [False, True])
def test_read_only_disk(groups: Groups, disk: Path, in_background: bool) -> None:
    groups(2).run(save_only, str(disk))
    set_read_only(disk, True)
    messages = groups(2).run(error_of_save, str(disk), in_background)
    assert messages[0] == messages[1]
    assert str(disk) in messages[0]
    groups(2).run(loaded, str(disk))  # loading needs no free space


def save_only(disk: str) -> None:
    run = Run()
    save(run, disk, False)


def test_trainer_on_a_read_only_disk(disk: Path) -> None:
    write_text(disk)
    set_read_only(disk, True)
    done = subprocess.run(**command(disk, "name=no"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 1
    assert "Read-only file system" in done.stdout
