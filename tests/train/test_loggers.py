"""Loggers keep everything they were given, however the run ends."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hecate.train import loggers as module
from hecate.train.loggers import JsonLines, loggers, read_metrics
from tests.train.configs import config


def test_json_lines_drop_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = JsonLines(path, first_step=3)
    log.log({"step": 3, "loss": 0.5})
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_loggers_work_without_an_account(tmp_path: Path, kind: str) -> None:
    with loggers(config(f"logger={kind}")["logger"], tmp_path, first_step=1) as made:
        for logger in made:
            logger.log({"step": 1, "loss": 0.5, "loads": [[1, 2]]})
    assert any(p.is_file() for p in (tmp_path / kind).rglob("*"))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "loads": [[1, 2]]}]


def test_unknown_logger_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"logger.kind='paper': must be one of none, tensorboard, wandb"),
        loggers({"kind": "paper"}, tmp_path, first_step=1),
    ):
        pass


@pytest.mark.parametrize("error", [None, ValueError(), KeyboardInterrupt()])
def test_all_are_closed_although_one_fails_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    closed: list[tuple[str, bool]] = []

    class Broken(JsonLines):
        def close(self, failed: bool = False) -> None:
            super().close()
            closed.append(("lines", failed))

    class Full:
        def __init__(self, folder: Path, first_step: int) -> None:
            pass

        def log(self, metrics: Mapping[str, Any]) -> None:
            pass

        def close(self, failed: bool = False) -> None:
            closed.append(("board", failed))
            raise OSError("No space left on device")

    monkeypatch.setattr(module, "JsonLines", Broken)
    monkeypatch.setattr(module, "TensorBoard", Full)
    with suppress(OSError), loggers({"kind": "tensorboard"}, tmp_path, first_step=1):
        if error is not None:
            raise error
    # The first one learns of the other's error.
    assert closed == [("board", error is not None), ("lines", True)]


def test_first_logger_is_closed_where_the_second_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[JsonLines] = []

    class Kept(JsonLines):
        def __init__(self, path: Path, first_step: int) -> None:
            super().__init__(path, first_step)
            made.append(self)

    monkeypatch.setattr(module, "JsonLines", Kept)
    with pytest.raises(ValueError, match="paper"), loggers({"kind": "paper"}, tmp_path, first_step=1):
        pass
    assert made[0]._file.closed
