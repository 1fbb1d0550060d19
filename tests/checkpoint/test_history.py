"""The newest complete checkpoint is found by its content; old ones beyond a number are deleted."""

from __future__ import annotations

import errno
import io
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hecate.checkpoint.history import latest, prune
from tests.checkpoint.runs import Run
from tests.workers import Groups


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3, whose names do not show the step."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run = Run()
    for step, name in enumerate(("c", "a", "b/state"), start=1):
        run.train(step, step + 1)
        run.engine.save(folder / name, run.optimizer)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_latest_is_found_by_its_step(folder: Path) -> None:
    assert latest(folder) == folder / "b/state"
    (folder / "b").rename(folder / "0")
    assert latest(folder) == folder / "0/state"


def test_nothing_to_find(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None


def test_unfinished_is_not_found(folder: Path) -> None:
    (folder / "b/state").rename(folder / "d.tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest(folder) == folder / "a"


FILES = ("__0_0.distcp", "hecate.json", "manifest.json", ".metadata")


def cut(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, Path.unlink, replace_by_a_folder])
@pytest.mark.parametrize("name", FILES)
def test_partial_is_passed_over_and_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / "b/state" / name)
    with pytest.warns(UserWarning, match=rf"b/state: .*{name} is (damaged|missing).*passed over"):
        assert latest(folder) == folder / "a"


@pytest.mark.parametrize("text", ["[]", "3", '{"stdp": 3}', '{"step": null}'])
@pytest.mark.parametrize("name", ["hecate.json", "manifest.json"])
def test_damage_that_still_reads_as_json(folder: Path, name: str, text: str) -> None:
    (folder / "b/state" / name).write_text(text)
    with pytest.warns(UserWarning, match=rf"b/state: file {name} is damaged.*passed over"):
        assert latest(folder) == folder / "a"


@pytest.mark.parametrize("name", FILES)
def test_damaged_is_passed_over_and_named(folder: Path, name: str) -> None:
    damage(folder / "b/state" / name)
    with pytest.warns(UserWarning, match=rf"b/state: file {name} is damaged.*passed over"):
        assert latest(folder) == folder / "a"
    damage(folder / "a" / name)
    damage(folder / "c" / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert latest(folder) is None
    assert len(caught) == 3


def test_ranks_agree_although_each_checks_other_files(groups: Groups, folder: Path) -> None:
    damage(folder / "b/state/__0_0.distcp")
    assert groups(2).run(latest, folder) == [folder / "a"] * 2


def unreadable(file: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Opening the file, or reading it once it is open (EIO), fails as on a bad disk."""
    path_open, read_bytes = Path.open, Path.read_bytes

    class Broken(io.RawIOBase):
        def readinto(self, buffer: object) -> int:
            raise OSError(error, os.strerror(error))

    def open_file(path: Path, *args: Any, **settings: Any) -> Any:
        return Broken() if path == file else path_open(path, *args, **settings)

    def read(path: Path) -> bytes:
        if path == file:
            raise OSError(error, os.strerror(error))
        return read_bytes(path)

    monkeypatch.setattr(Path, "open", open_file)
    monkeypatch.setattr(Path, "read_bytes", read)


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", FILES)
def test_unreadable_is_passed_over_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int
) -> None:
    unreadable(folder / "b/state" / name, monkeypatch, error)
    with pytest.warns(UserWarning, match=rf"b/state: file {name} cannot be read: {os.strerror(error)}; it is passed"):
        assert latest(folder) == folder / "a"
    run = Run()
    with pytest.raises(OSError, match=f"file {name} cannot be read"):
        run.engine.load(folder / "b/state")
    assert run.engine.stats()["step"] == 0


def latest_with_a_bad_disk(folder: Path) -> tuple[Path | None, list[str]]:
    """One rank can read neither the settings nor the tensors of the newest checkpoint."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if dist.get_rank() == 1:
            for name in ("hecate.json", "__0_0.distcp"):
                unreadable(folder / "b/state" / name, patch, errno.EIO)
        return latest(folder), [str(warning.message) for warning in caught]


def test_ranks_agree_although_one_cannot_read(groups: Groups, folder: Path) -> None:
    (found, said), (other, nothing) = groups(2).run(latest_with_a_bad_disk, folder)
    assert found == other == folder / "a"
    assert len(said) == 1
    assert "cannot be read: Input/output error; it is passed over" in said[0]
    assert nothing == []


def test_folder_that_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path) == folder / "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="checkpoints/b"):
        latest(folder)


def test_flipped_step_is_not_taken_for_an_older_one(folder: Path) -> None:
    """The step of the newest checkpoint is damaged from 3 to 1, so that it would silently count as older."""
    record = folder / "b/state/hecate.json"
    assert '"step": 3' in record.read_text()
    record.write_text(record.read_text().replace('"step": 3', '"step": 1'))
    with pytest.warns(UserWarning, match=r"b/state: file hecate\.json is damaged"):
        assert latest(folder) == folder / "a"


def test_prune_keeps_those_with_most_steps(folder: Path) -> None:
    prune(folder, keep=3)
    assert {p.parent for p in folder.rglob("manifest.json")} == {folder / n for n in ("c", "a", "b/state")}
    prune(folder, keep=1)
    assert {p.parent for p in folder.rglob("manifest.json")} == {folder / "b/state"}
    assert sorted(p.name for p in folder.iterdir()) == ["b"]


def test_prune_does_not_count_what_cannot_be_read(folder: Path) -> None:
    damage(folder / "b/state/hecate.json")
    prune(folder, keep=1)
    assert {p.parent for p in folder.rglob("manifest.json")} == {folder / "a", folder / "b/state"}


def test_prune_keeps_at_least_one(folder: Path) -> None:
    with pytest.raises(ValueError, match="keep=0 must be >= 1"):
        prune(folder, keep=0)
