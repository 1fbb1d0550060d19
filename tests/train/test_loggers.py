"""Loggers keep everything they were given, however the run ends."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

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


def test_lines_wait_until_the_disk_has_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl", first_step=1)
    file, log._file = log._file, mock.MagicMock(wraps=log._file)
    log._file.name = "metrics.jsonl"
    log._file.write.side_effect = [4, *[OSError(errno.ENOSPC, "No space left on device")] * 2]  # 4 bytes are written
    file.write(b'{"st')
    log.log({"step": 1})
    log.log({"step": 2})
    assert capsys.readouterr().err.count("No space left on device; lines are kept") == 1
    log._file = file
    log.log({"step": 3})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_tensorboard_has_tags_in_groups_and_histograms(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step = {"step": 20, "loss": 0.5, "seconds": 2.0, "copies": 3, "loads": [[1, 2], [3, 0]]}
    with loggers(config("logger=tensorboard")["logger"], tmp_path, 1, {}) as made:
        for logger in made:
            logger.log(step)
            logger.log(step | {"step": 21})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "perf/seconds", "balance/copies"}
    assert events.Tags()["histograms"] == ["balance/loads/0", "balance/loads/1"]
    assert [e.step for e in events.Histograms("balance/loads/1")] == [20]


def records(path: Path) -> Iterator[Any]:
    """What W&B wrote while it was offline: pieces in blocks of 32 KiB, each after its checksum, size and kind."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-not-found]

    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_a_requeued_run_is_one_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    section = config("logger=wandb", "logger.tags=[a]", "logger.group=g")["logger"]
    (tmp_path / "run.png").write_bytes(b"picture")
    for first_step in (20, 21):
        with loggers(section, tmp_path, first_step, {"seed": 3}) as made:
            for logger in made:
                logger.log({"step": first_step, "loss": 0.5, "seconds": 2.0, "copies": 3, "loads": [[1, 2], [3, 0]]})
                logger.keep([tmp_path / "run.png"])
    wandb.teardown()  # as at the process' exit: before, its service may not have written everything
    parts = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    found = [list(records(part)) for part in parts]
    runs = [next(r.run for r in part if r.HasField("run")) for part in found]
    assert [run.run_id for run in runs] == [(tmp_path / "wandb_id").read_text().strip()] * 2
    for run in runs:
        assert (run.project, run.run_group, run.job_type, list(run.tags)) == ("hecate", "g", "train", ["a"])
        assert {update.key: update.value_json for update in run.config.update}["seed"] == "3"
    rows = [history(r) for part in found for r in part if r.HasField("history")]
    assert [row["_step"] for row in rows] == [row["step"] for row in rows] == [20, 21]
    for row in rows:
        assert (row["train/loss"], row["perf/seconds"], row["balance/copies"]) == (0.5, 2.0, 3)
    assert sum(rows[0]["balance/loads/1"]["values"]) == 2  # two experts
    assert "balance/loads/1" not in rows[1]
    for part in found:
        artifacts = [r.artifact for r in part if r.HasField("artifact")]
        assert [(a.type, [c.path for c in a.manifest.contents]) for a in artifacts] == [("report", ["run.png"])]


def history(record: Any) -> dict[str, Any]:
    """Values of one row by name."""
    row: dict[str, Any] = {}
    for item in record.history.item:
        names = list(item.nested_key) or [item.key]
        place = row
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = json.loads(item.value_json)
    return row


def test_steps_that_are_made_again_are_not_dropped_by_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    run = mock.Mock(step=26)  # as of a run that had logged its step 25, before a crash
    monkeypatch.setattr(wandb, "init", lambda **given: run)
    with loggers(config("logger=wandb")["logger"], tmp_path, 21, {}) as made:
        for step in (21, 22, 30):
            made[1].log({"step": step, "loss": 0.5})
    logged = [(call.args[0]["step"], call.kwargs["step"]) for call in run.log.call_args_list]
    assert logged == [(21, 26), (22, 27), (30, 30)]


def test_unknown_logger_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"logger.kind='paper': must be one of none, tensorboard, wandb"),
        loggers({"kind": "paper"}, tmp_path, 1, {}),
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
    with suppress(OSError), loggers({"kind": "tensorboard"}, tmp_path, 1, {}):
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
    with pytest.raises(ValueError, match="paper"), loggers({"kind": "paper"}, tmp_path, 1, {}):
        pass
    assert made[0]._file.closed
