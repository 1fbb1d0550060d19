"""A checkpoint written in the background has the state of the step in which `save` was called."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hecate.checkpoint import background
from tests.checkpoint.runs import Run
from tests.checkpoint.states import Full, assert_equal
from tests.workers import Groups


def save_during_steps(path: str) -> tuple[Full, Full, list[float]]:
    """Training continues before the first byte is written. Returns state and losses then, and the loaded state."""
    run, go = Run(), Event()
    run.train(0, 2)
    expected = run.engine.full_state_dict()
    write = background.write

    def wait_and_write(*args: object, **settings: object) -> None:
        assert go.wait(30)
        write(*args, **settings)  # type: ignore[arg-type]

    with patch.object(background, "write", wait_and_write):
        handle = run.engine.save(path, run.optimizer, async_op=True)
    assert handle is not None
    losses = run.train(2, 4)
    assert not handle.done()
    assert not Path(path).exists()
    go.set()
    run.train(4, 6)
    handle.wait()
    again = Run(seed=7)
    again.engine.load(path, again.optimizer)
    loaded = again.engine.full_state_dict()
    assert again.train(2, 4) == losses
    return expected, loaded, losses


def test_steps_after_it_do_not_show(groups: Groups, tmp_path: Path) -> None:
    for expected, loaded, _ in groups(2).run(save_during_steps, str(tmp_path / "two")):
        assert_equal(expected, loaded)
    expected, loaded, _ = save_during_steps(str(tmp_path / "one"))
    assert_equal(expected, loaded)


def overlapping_saves(path: str) -> None:
    """Saves run one after another, and the last one is kept; loading waits for it."""
    run = Run()
    for step in range(3):
        run.train(step, step + 1)
        run.engine.save(path, run.optimizer, async_op=True)
    expected = run.engine.full_state_dict()
    run.train(3, 4)
    run.engine.load(path, run.optimizer)
    assert_equal(run.engine.full_state_dict(), expected)
    assert run.engine.stats()["step"] == 3
    if dist.get_rank() == 0:
        assert [p.name for p in Path(path).parent.iterdir()] == ["checkpoint"]


def test_saves_do_not_overlap(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(overlapping_saves, str(tmp_path / "checkpoint"))


def failing_save(folder: str) -> str:
    """The error of one rank is raised once on all ranks, by the handle or else by the next call."""
    run, wrong, right = Run(), Path(folder) / "file" / "checkpoint", Path(folder) / "checkpoint"
    run.engine.save(wrong, async_op=True)
    with pytest.raises(OSError, match="file"):
        run.engine.save(right)
    handle = run.engine.save(wrong, async_op=True)
    assert handle is not None
    with pytest.raises(OSError, match="file") as error:
        handle.wait()
    run.engine.save(right)
    return type(error.value).__name__


def test_failure_is_raised_on_all_ranks(groups: Groups, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert groups(2).run(failing_save, str(tmp_path)) == ["NotADirectoryError"] * 2
    assert (tmp_path / "checkpoint" / "manifest.json").exists()


def test_copy_shares_nothing(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 1)
    state = run.engine._training_state()
    shared = background.collect(tmp_path, state, run.optimizer, {}, copy=False)
    copied = background.collect(tmp_path, state, run.optimizer, {}, copy=True)
    assert shared.entries.keys() == copied.entries.keys()
    for name, value in shared.entries.items():
        left, right = (getattr(v, "rows", v) for v in (value, copied.entries[name]))
        assert torch.equal(left, right), name
        assert left.data_ptr() != right.data_ptr(), name


def after_the_process_group(path: str) -> list[str]:
    """Errors if the model is on two ranks, but the process group has been destroyed."""
    run, errors = Run(), []
    run.engine.save(path)
    fresh = Run()
    with patch.object(dist, "is_initialized", lambda: False):
        for call in (lambda: fresh.engine.save(path), lambda: run.engine.load(path)):
            with pytest.raises(RuntimeError) as error:
                call()
            errors.append(str(error.value))
    return errors


def test_no_rank_takes_itself_for_the_only_one(groups: Groups, tmp_path: Path) -> None:
    for errors in groups(2).run(after_the_process_group, str(tmp_path / "checkpoint")):
        for error, call in zip(errors, ("save", "load"), strict=True):
            assert f"FSSDP.{call}(" in error
            assert "the model is on 2 ranks, the process group has 1" in error
    Run().engine.load(tmp_path / "checkpoint")
