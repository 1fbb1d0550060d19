"""If something cannot be loaded or written, the error names it, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hecate
from hecate.checkpoint import folder
from tests.checkpoint.runs import TINY, Run
from tests.checkpoint.states import assert_like, assert_refused, everything
from tests.workers import Groups


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "hecate.json", "manifest.json"])
def test_damaged_file_is_named(checkpoint: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(checkpoint / name)
    run = Run(seed=7)
    run.train(5, 6)
    assert_refused(run, checkpoint, f"{name} is (damaged|missing)")


def test_all_ranks_refuse_what_one_rank_finds_damaged(groups: Groups, checkpoint: Path) -> None:
    names = sorted(json.loads((checkpoint / "manifest.json").read_text())["files"])
    flip(checkpoint / names[1])  # rank 1 checks it
    assert groups(2).run(error_of_load, str(checkpoint)) == [f"file {names[1]} is damaged"] * 2


def error_of_load(path: str) -> str:
    run = Run()
    with pytest.raises(ValueError, match="is damaged") as error:
        run.engine.load(path, run.optimizer)
    return str(error.value).split(": ")[1]


def test_newer_format(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["format"] += 1
    manifest["files"] = "in another way"
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(Run(), checkpoint, "has format 3, this version of hecate reads up to 2")


def test_no_checkpoint(tmp_path: Path) -> None:
    assert_refused(Run(), tmp_path / "nowhere", "no such checkpoint")
    (tmp_path / "empty").mkdir()
    assert_refused(Run(), tmp_path / "empty", "no such checkpoint")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 6}, r"blocks\.0\.moe\.experts\.up has 8 experts in the checkpoint, 6 in the model"),
        ({"expert_ratio": 3}, r"experts\.up has shape \(8, 32, 16\) in the checkpoint, \(8, 48, 16\) in the model"),
        ({"vocab_size": 33}, r"has shape \(31, 16\) in the checkpoint, \(33, 16\) in the model"),
        ({"num_layers": 5}, r"the checkpoint lacks blocks\.3\.(\S+, ){9}\S+ and \d+ more$"),
        ({"num_layers": 1}, r"the checkpoint has blocks\.1\.(\S+, ){9}\S+ and \d+ more, which are not here$"),
    ],
)
def test_another_model(saved: Path, changes: dict[str, int], message: str) -> None:
    run = Run(model=replace(TINY, **changes))
    before = run.engine.full_state_dict()
    with pytest.raises(ValueError, match=message):
        run.engine.load(saved)
    assert all(torch.equal(before[name], value) for name, value in run.engine.full_state_dict().items())


def test_another_dtype(saved: Path) -> None:
    run = Run(hecate.FSSDPConfig(master_dtype=torch.float32))
    assert_refused(run, saved, r"dtype torch\.float64 in the checkpoint, torch\.float32 in the model")


def test_another_optimizer(saved: Path) -> None:
    run = Run()
    trained = [p for n, p in run.model.named_parameters() if not n.startswith("blocks.0.")]
    run.optimizer = torch.optim.AdamW(trained)
    assert_refused(run, saved, r"trained parameters, the checkpoint has blocks\.0\.")
    run.optimizer = torch.optim.AdamW([*run.model.parameters(), nn.Parameter(torch.zeros(3))])
    assert_refused(run, saved, r"parameter \d+ of group 0, shape \(3,\), is not of this model")


def test_another_kind_of_optimizer(saved: Path) -> None:
    for kind, there in ((torch.optim.SGD, "amsgrad, betas"), (torch.optim.RMSprop, "amsgrad, betas")):
        run = Run()
        run.optimizer = kind(run.model.parameters())
        assert_refused(
            run, saved, rf"optimizer: {kind.__name__} has settings .*, the saved one {there}.* the same kind"
        )


def test_groups_that_were_several(tmp_path: Path) -> None:
    run = Run(optimizer="groups")
    run.train(0, 1)
    run.engine.save(tmp_path / "groups", run.optimizer)
    assert_refused(Run(), tmp_path / "groups", "was 2 groups when it was saved")


def test_extra_that_is_not_json(saved: Path, checkpoint: Path) -> None:
    run = Run()
    with pytest.raises(ValueError, match=r"FSSDP.save.*extra must be numbers, strings.*Tensor is not JSON"):
        run.engine.save(checkpoint, run.optimizer, extra={"rng": torch.get_rng_state()})
    assert_like(checkpoint, saved)


def test_full_disk_leaves_the_one_before(saved: Path, checkpoint: Path) -> None:
    """A limit on the size of files stands in for a full disk."""
    run = Run()
    run.train(0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"FSSDP.save.*File too large"):
            run.engine.save(checkpoint, run.optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_like(checkpoint, saved)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = Run()
    with pytest.raises(OSError, match="file"):
        run.engine.save(tmp_path / "file" / "checkpoint", run.optimizer)


def test_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("mine")
    with pytest.raises(NotADirectoryError, match="checkpoint"):
        Run().engine.save(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(OSError, match="a mount point cannot be replaced, save to a folder in it"):
        Run().engine.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_files_of_the_folder_stay(checkpoint: Path) -> None:
    """Saving into a folder with other files must not delete them: it could be a whole project."""
    (checkpoint / "code").mkdir()
    (checkpoint / "code" / "train.py").write_text("mine")
    (checkpoint / "__7_0.distcp").write_text("of a larger world")
    run = Run(seed=7)
    run.engine.save(checkpoint, run.optimizer)
    assert (checkpoint / "code" / "train.py").read_text() == "mine"
    assert not (checkpoint / "__7_0.distcp").exists()
    again = Run()
    again.engine.load(checkpoint, again.optimizer)
    assert all(torch.equal(value, everything(run)[name]) for name, value in everything(again).items())


def test_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)

        def record(first: Any, *rest: Any, name: str = name, call: Callable[..., None] = call) -> None:
            path = first if isinstance(first, Path) else Path(os.readlink(f"/proc/self/fd/{first}"))
            done.append((name, path.name))
            call(first, *rest)

        monkeypatch.setattr(folder.os, name, record)
    folder.replace_file(tmp_path / "file", "text")
    assert done == [("fsync", "file.part"), ("replace", "file.part"), ("fsync", tmp_path.name)]
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("renames", [0, 1])
def test_crash_before_a_rename(saved: Path, checkpoint: Path, renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when the new checkpoint is complete but not in place, or between the two renames."""

    class Killed(BaseException):
        pass

    done: list[Path] = []
    rename = os.rename

    def die(source: Path, target: Path) -> None:
        if Path(source).name.startswith("checkpoint"):
            if len(done) == renames:
                raise Killed
            done.append(source)
        rename(source, target)

    monkeypatch.setattr(folder.os, "rename", die)
    run = Run(seed=7)
    run.train(0, 1)
    with pytest.raises(Killed):
        run.engine.save(checkpoint, run.optimizer)
    monkeypatch.undo()
    assert_like(checkpoint, saved)
    run.engine.save(checkpoint, run.optimizer)
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]
    again = Run()
    again.engine.load(checkpoint, again.optimizer)
    assert everything(again).keys() == everything(run).keys()
    assert all(torch.equal(value, everything(run)[name]) for name, value in everything(again).items())
