"""If a folder is a link, e.g. to another file system, the link is kept and its target is replaced atomically."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hecate.checkpoint import folder
from hecate.checkpoint.history import latest, prune
from tests.checkpoint.runs import Run

Save = Callable[[Run, Path], Any]
SAVES: dict[str, Save] = {
    "save": lambda run, path: run.engine.save(path, run.optimizer),
    "save in the background": lambda run, path: run.engine.save(path, async_op=True).wait(),  # type: ignore[union-attr]
    "save_pretrained": lambda run, path: run.engine.save_pretrained(path),
}


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path]]:
    """Folders that folders are renamed from and to; two of them might be on two file systems, which is an error."""
    found: list[tuple[Path, Path]] = []
    rename = os.rename

    def record(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            found.append((Path(os.path.realpath(Path(source).parent)), Path(os.path.realpath(Path(target).parent))))
        rename(source, target)

    monkeypatch.setattr(folder.os, "rename", record)
    return found


def same(left: Run, right: Run) -> bool:
    expected = left.engine.full_state_dict()
    return all(torch.equal(value, expected[name]) for name, value in right.engine.full_state_dict().items())


def load(run: Run, path: Path) -> None:
    if (path / "model.safetensors").exists():
        run.engine.load_pretrained(path)
    else:
        run.engine.load(path)


@pytest.mark.parametrize("linked", ["target", "parent", "dangling"])
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_link_stays(tmp_path: Path, renamed: list[tuple[Path, Path]], save: Save, linked: str) -> None:
    real, links = tmp_path / "real", tmp_path / "links"
    real.mkdir()
    links.mkdir()
    link, path = (links, links / "checkpoint") if linked == "parent" else (links / "checkpoint",) * 2
    target = real if linked == "parent" else real / "target"
    if linked == "parent":
        links.rmdir()
    elif linked == "target":
        save(Run(seed=5), target)
    link.symlink_to(target)
    for seed in (1, 2):
        run = Run(seed=seed)
        save(run, path)
        again = Run(seed=7)
        load(again, path)
        assert same(run, again)
    assert link.is_symlink()
    assert [p.name for p in real.iterdir()] == ["checkpoint" if linked == "parent" else "target"]
    assert [p.name for p in links.iterdir()] == ["checkpoint"]
    assert {source for source, _ in renamed} == {target for _, target in renamed} == {real}


def test_interrupted_save_behind_a_link_is_found(tmp_path: Path) -> None:
    """Between the renames the link leads nowhere."""
    run, again = Run(), Run(seed=7)
    run.engine.save(tmp_path / "target.old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    again.engine.load(tmp_path / "link")
    assert same(run, again)


def test_latest_and_prune_take_links_for_what_they_lead_to(tmp_path: Path) -> None:
    run, real, path = Run(), tmp_path / "real", tmp_path / "checkpoints"
    path.symlink_to(tmp_path / "behind")
    for step, where in enumerate((path / "a", path / "b", real), start=1):
        run.train(step, step + 1)
        run.engine.save(where)
    (path / "c").symlink_to(real)
    (path / "best").symlink_to(path / "a")
    (path / "up").symlink_to(tmp_path)
    assert latest(path) == path / "c"
    prune(path, keep=2)
    assert sorted(p.name for p in path.iterdir()) == ["b", "best", "c", "up"]
    assert latest(path) == path / "c"
    run.train(4, 5)
    run.engine.save(path / "d")
    run.engine.save(path / "e")
    prune(path, keep=2)
    assert sorted(p.name for p in path.iterdir()) == ["best", "d", "e", "up"]
    assert latest(real) == real  # behind a link: not in that folder, not deleted
