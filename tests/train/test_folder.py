"""The folder of a run: what is kept, what is deleted, and which run it belongs to after a restart."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, TCPStore

from hecate.train.distributed import launch_name
from hecate.train.folder import RunFolder
from hecate.train.signals import launches
from tests.train.configs import config

FIRST, AGAIN = {"torchrun a": False}, {"torchrun a": True}


def run_folder(
    path: Path, *overrides: str, overwrite: bool = False, launched: Mapping[str, bool] | None = None
) -> RunFolder:
    return RunFolder(path, config(*overrides), overwrite, launched or {})


def make_checkpoint(folder: RunFolder, name: str) -> Path:
    """As far as `RunFolder` looks at it."""
    path = folder.checkpoints / name
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("")
    return path


def test_unfinished_run_is_continued_and_finished_one_left_or_extended(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", "steps=6")
    assert folder.prepare()
    (folder.path / "metrics.jsonl").write_text("")
    (folder.path / "mine.txt").write_text("not a file of a run")
    kept, partial = make_checkpoint(folder, "step-9"), make_checkpoint(folder, "step-12.tmp")
    assert folder.prepare()
    assert kept.exists()
    assert not partial.exists()
    summary = folder.path / "summary.json"
    summary.write_text("{}")
    for steps in (6, 5):  # the same command, or fewer steps: nothing to do
        assert not run_folder(tmp_path / "r", f"steps={steps}").prepare()
        assert summary.exists()
        assert kept.exists()
    assert run_folder(tmp_path / "r", "steps=9").prepare()
    assert not summary.exists()
    assert kept.exists()
    summary.write_text("{}")
    assert run_folder(tmp_path / "r", "steps=9", overwrite=True).prepare()
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml", "launches.json", "mine.txt"]


def test_finished_run_without_checkpoint_cannot_be_extended(tmp_path: Path) -> None:
    run_folder(tmp_path, "steps=6").prepare()
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the run of 6 steps left no checkpoint .* steps=9 cannot continue it"):
        run_folder(tmp_path, "steps=9").prepare()
    assert (tmp_path / "summary.json").exists()


def test_overwrite_starts_a_run_again(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, overwrite=True)
    checkpoint = make_checkpoint(folder, "step-9")
    assert folder.prepare()
    assert not checkpoint.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_restart_goes_on_with_the_run_of_its_launch(tmp_path: Path, overwrite: bool) -> None:
    assert run_folder(tmp_path, overwrite=overwrite, launched=FIRST).prepare()
    folder = run_folder(tmp_path, overwrite=overwrite, launched=AGAIN)
    checkpoint = make_checkpoint(folder, "step-9")
    assert folder.prepare()
    assert checkpoint.exists()
    (folder.path / "summary.json").write_text("{}")
    assert not folder.prepare()
    assert checkpoint.exists()


@pytest.mark.parametrize("others", [None, {"torchrun b": False}])
def test_restart_before_the_folder_was_cleared_clears_it(tmp_path: Path, others: Mapping[str, bool] | None) -> None:
    folder = run_folder(tmp_path, overwrite=True, launched=AGAIN)
    if others is not None:
        run_folder(tmp_path, launched=others).prepare()
    checkpoint = make_checkpoint(folder, "step-9")
    assert folder.prepare()
    assert not checkpoint.exists()
    ours = make_checkpoint(folder, "step-1")
    assert folder.prepare()
    assert ours.exists()


def test_restart_does_not_take_a_finished_run_of_another_launch_for_its_own(tmp_path: Path) -> None:
    run_folder(tmp_path, launched={"torchrun b": False}).prepare()
    (tmp_path / "summary.json").write_text("{}")
    assert run_folder(tmp_path, overwrite=True, launched=AGAIN).prepare()
    assert not (tmp_path / "summary.json").exists()


def test_requeued_job_goes_on_under_a_new_torchrun(tmp_path: Path) -> None:
    run_folder(tmp_path, overwrite=True, launched={"torchrun a": False, "slurm 7": False}).prepare()
    folder = run_folder(tmp_path, overwrite=True, launched={"torchrun b": False, "slurm 7": True})
    checkpoint = make_checkpoint(folder, "step-9")
    assert folder.prepare()
    assert checkpoint.exists()
    # In another allocation, where torchrun restarts, the job of the old run is not what was restarted.
    assert run_folder(tmp_path, overwrite=True, launched={"torchrun c": True, "slurm 7": False}).prepare()
    assert not checkpoint.exists()


def test_linked_checkpoints_are_dropped_where_they_are(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", overwrite=True)
    (tmp_path / "elsewhere").mkdir()
    folder.path.mkdir()
    folder.checkpoints.symlink_to(tmp_path / "elsewhere")
    make_checkpoint(folder, "step-9")
    assert folder.prepare()
    assert folder.checkpoints.is_symlink()
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.fixture
def undeletable(tmp_path: Path) -> Iterator[RunFolder]:
    """An old run with a checkpoint on which a file system is mounted, so that nobody can delete it."""
    folder = run_folder(tmp_path / "r", overwrite=True)
    checkpoint = make_checkpoint(folder, "step-9")
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(checkpoint)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(checkpoint)], check=True)


def test_what_cannot_be_deleted_is_named(undeletable: RunFolder) -> None:
    with pytest.raises(OSError, match=rf"cannot delete {undeletable.checkpoints}: .*'step-9'"):
        undeletable.prepare()


def test_resuming_with_another_model_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.prepare()
    make_checkpoint(folder, "step-1")
    run_folder(tmp_path, "policy=ep", "steps=9").prepare()
    with pytest.raises(ValueError, match="the run in this folder has seed=0, this command 1"):
        run_folder(tmp_path, "seed=1").prepare()
    other = "model.d_model=128, this command 64; model.top_k=2, this command 1; they must"
    with pytest.raises(ValueError, match=f"has {other}"):  # only what differs
        run_folder(tmp_path, "model.d_model=64", "model.top_k=1").prepare()


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        (None, {}, {}),
        ("a", {"TORCHELASTIC_RESTART_COUNT": "0"}, {"torchrun a": False}),
        ("a", {"TORCHELASTIC_RESTART_COUNT": "2"}, {"torchrun a": True}),
        (None, {"SLURM_JOB_ID": "7"}, {"slurm 7": False}),
        ("a", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"torchrun a": False, "slurm 7": True}),
    ],
)
def test_launchers_say_that_they_restarted(
    name: str | None, environment: dict[str, str], expected: dict[str, bool]
) -> None:
    assert launches(name, environment) == expected


def test_name_of_a_launch_outlives_its_processes() -> None:
    store, other = (TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2))
    assert launch_name(PrefixStore("run", store)) == launch_name(PrefixStore("run", store))
    assert launch_name(PrefixStore("run", store)) != launch_name(PrefixStore("run", other))
