"""The files of a finished run: the report says that it is finished, and costs nothing where it cannot be made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hecate.train import finish
from hecate.train.finish import write_files
from hecate.train.settings import Settings
from tests.report.synthetic import run
from tests.train.configs import config


def finished(root: Path, *overrides: str, lost: str = "no file") -> list[str]:
    """Names of the files of a run of 5 steps, one of whose own files is `lost`."""
    run(root / "short", 5)
    (root / "short" / lost).unlink(missing_ok=True)
    written = write_files({"steps": 5}, Settings.from_config(config(f"output={root}", "name=short", *overrides)))
    assert all(path.parent == root / "short" and path.stat().st_size for path in written)
    assert json.loads((root / "short" / "summary.json").read_text()) == {"steps": 5}
    return [path.name for path in written]


def test_the_report_is_made_of_the_finished_run(tmp_path: Path) -> None:
    assert finished(tmp_path) == ["run.png", "summary.json", "report.html"]
    assert '"finished":true' in (tmp_path / "short" / "report.html").read_text()


def test_without_a_report(tmp_path: Path) -> None:
    assert finished(tmp_path, "report=false") == ["run.png", "summary.json"]
    assert not (tmp_path / "short" / "report.html").exists()


def test_a_report_that_cannot_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def html(runs: list[Path], path: Path) -> Path:
        raise OSError("No space left on device")

    monkeypatch.setattr(finish, "html", html)
    assert finished(tmp_path) == ["run.png", "summary.json"]
    report = tmp_path / "short" / "report.html"
    assert f"{report}: cannot be written (No space left on device)" in capsys.readouterr().out


def test_a_run_whose_layers_were_not_recorded_has_its_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished(tmp_path, lost="layers.bin") == ["run.png", "summary.json"]
    assert "no layers.bin in it" in capsys.readouterr().out
