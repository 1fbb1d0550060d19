"""Recorders of rank 0: a disk that is full ends a record, not the run, and keeps what was recorded before."""

from __future__ import annotations

import errno
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from hecate.loads.trace import TraceWriter, read_trace
from hecate.placement import Topology
from hecate.train.recorder import LoadsRecorder

COUNTS = [np.ones((2, 4), dtype=np.int64)]


def test_a_full_disk_ends_the_record_of_loads_and_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    full = OSError(errno.ENOSPC, "No space left on device")
    with LoadsRecorder(tmp_path / "trace.npz", Topology(2, 2), [4], said.append) as recorder:
        recorder.append(1, COUNTS)
        recorder.flush()
        recorder.append(2, COUNTS)
        with mock.patch.object(TraceWriter, "_write", side_effect=full):
            recorder.flush()
        recorder.append(3, COUNTS)
    assert said == [
        f"{tmp_path / 'trace.npz'}: cannot be written (No space left on device); no further loads are recorded"
    ]
    assert read_trace(tmp_path / "trace.npz").steps.tolist() == [1]


def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(b"PK half of it")
    with LoadsRecorder(path, Topology(2, 2), [4], print) as recorder:
        recorder.append(1, COUNTS)
    assert read_trace(path).steps.tolist() == [1]
    assert (tmp_path / "trace.damaged.npz").read_bytes() == b"PK half of it"


def test_loads_of_another_model_are_not_continued(tmp_path: Path) -> None:
    with LoadsRecorder(tmp_path / "trace.npz", Topology(2, 2), [4], print):
        pass
    with pytest.raises(ValueError, match="cannot be continued"):
        LoadsRecorder(tmp_path / "trace.npz", Topology(2, 2), [8], print)
