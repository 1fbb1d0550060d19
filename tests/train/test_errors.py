"""An error of all ranks is said once; that of one rank with its rank."""

from __future__ import annotations

import pytest
from torch.distributed import TCPStore

from hecate.train import distributed
from hecate.train.__main__ import RANK_0_SPEAKS_WITHIN, _refuse
from hecate.train.distributed import _met, _say_once, _saying
from hecate.train.settings import Settings
from tests.train.configs import config


def test_each_message_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank, message in enumerate(("lr: bad", "lr: bad", "disk full")):
        _say_once(store, rank, message)
    assert capsys.readouterr().err == "error: lr: bad\nerror on rank 2: disk full\n"


def test_a_rank_does_not_wait_long_for_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", distributed.PATIENCE / 100)
    _say_once(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 1, "disk full")
    assert capsys.readouterr().err == "error on rank 1: disk full\n"


def test_ranks_that_do_not_meet_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    settings = Settings.from_config(config("timeout_seconds=0.5"))
    with pytest.raises(SystemExit, match=r"error on rank 1: the ranks do not meet at 127.0.0.1:1: "):
        _met(settings)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(SystemExit, match=r"do not meet at 127.0.0.1:\?: .*MASTER_PORT"):
        _met(settings)


def test_rank_0_has_time_to_say_what_is_wrong_with_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher ends rank 0 when another rank ends first."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank, code, seconds in (("0", "error: lr: bad", []), ("1", 1, [RANK_0_SPEAKS_WITHIN])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            _refuse(ValueError("lr: bad"))
        assert end.value.code == code
        assert waited == seconds


def test_only_bugs_and_debug_have_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings, debug = (Settings.from_config(config(f"debug={value}")) for value in ("false", "true"))
    with pytest.raises(SystemExit) as end, _saying(settings, store, 0):
        raise ValueError("lr=3: must be smaller")
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: lr=3: must be smaller\n"
    with pytest.raises(ValueError, match="lr=3"), _saying(debug, store, 0):
        raise ValueError("lr=3: must be smaller")
    with pytest.raises(KeyError), _saying(settings, store, 0):
        raise KeyError("a bug")
    assert capsys.readouterr().err == ""
