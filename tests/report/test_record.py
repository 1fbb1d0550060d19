"""The record of layers: what is written is read, whatever the end of the process that wrote it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.viewer import synthetic_layers
from hecate.placement import Topology
from hecate.report.record import DESCRIPTION, MAGIC, LayersFile, LayersWriter, RecordedStep
from hecate.train.recorder import Recorder

TOPOLOGY = Topology(4, 2)


def made(count: int, topology: Topology = TOPOLOGY) -> list[list[dict[str, Any]]]:
    return list(synthetic_layers(count, 3, 8, topology))


def write(path: Path, steps: list[list[dict[str, Any]]], first: int = 1, topology: Topology = TOPOLOGY) -> None:
    with LayersWriter(path, first) as writer:
        for number, layers in enumerate(steps, start=first):
            writer.append(RecordedStep.of(number, topology, layers))


def numbers(path: Path) -> list[int]:
    return [step.step for step in LayersFile(path)]


def test_everything_comes_back(tmp_path: Path) -> None:
    steps = made(3)
    steps[1][2]["loads"] = steps[1][2]["loads"] * 1_000_000  # needs more bits
    write(tmp_path / "layers.bin", steps)
    found = list(LayersFile(tmp_path / "layers.bin"))
    assert [step.step for step in found] == [1, 2, 3]
    for step, layers in zip(found, steps, strict=True):
        assert step.shape.layers == tuple(layer["name"] for layer in layers)
        for index, layer in enumerate(layers):
            assert step.of_layer(index).tolist() == layer["loads"].tolist()
            assert step.before[index].tolist() == layer["device_loads_before"].tolist()
            assert step.after[index].tolist() == layer["device_loads_after"].tolist()
            own = step.copied[step.copied[:, 0] == index]
            assert own[:, 1:3].tolist() == layer["copied"].tolist()
            assert own[:, 3].tolist() == layer["calibrated"].tolist()
            assert step.sent[index] == layer["bytes"]
            assert np.allclose(step.imbalance[:, index], [layer["imbalance_before"], layer["imbalance_after"]])
            assert np.allclose(step.seconds[index], list(layer["exposed"].values()))
    assert np.isnan(found[0].mispredicted).all()
    assert np.allclose(found[1].mispredicted, 0.02)


def test_a_killed_process_costs_its_last_step_only(tmp_path: Path) -> None:
    path = tmp_path / "layers.bin"
    write(path, made(3))
    whole = path.read_bytes()
    last = list(LayersFile(path).frames())[-1]
    for end in (last.start, last.start + 3, last.start + 20, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert numbers(path) == [1, 2]
    path.write_bytes(whole[:-1] + b"?")  # the last block did not reach the disk
    assert numbers(path) == [1, 2]
    write(path, made(2), first=3)
    assert numbers(path) == [1, 2, 3, 4]


def test_a_process_that_was_killed_before_its_first_step_leaves_a_record(tmp_path: Path) -> None:
    path, said = tmp_path / "layers.bin", list[str]()
    for begun in (b"", MAGIC[:3]):
        path.write_bytes(begun)
        assert numbers(path) == []
        with Recorder(path, 1, TOPOLOGY, said.append):
            assert path.read_bytes() == MAGIC  # at once
        assert said == []


def test_a_resumed_run_replaces_later_steps_and_may_have_other_devices(tmp_path: Path) -> None:
    path, other = tmp_path / "layers.bin", Topology(2, 2)
    write(path, made(4))
    write(path, made(2, other), first=3, topology=other)
    assert [(step.step, step.before.shape) for step in LayersFile(path)] == [
        (1, (3, 4)),
        (2, (3, 4)),
        (3, (3, 2)),
        (4, (3, 2)),
    ]
    assert sum(frame.step == DESCRIPTION for frame in LayersFile(path).frames()) == 2


def test_damage_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "layers.bin"
    write(path, made(3))
    frames, whole = list(LayersFile(path).frames()), path.read_bytes()
    hurt = frames[2]
    path.write_bytes(whole[: hurt.start + 30] + b"?" + whole[hurt.start + 31 :])
    with pytest.raises(ValueError, match=rf"layers.bin: the frame at byte {hurt.start} is damaged, and others follow"):
        numbers(path)
    path.write_bytes(b"loss,step\n" + whole)
    with pytest.raises(ValueError, match="so it is no record of layers"):
        numbers(path)


def test_the_trainer_puts_a_damaged_record_aside(tmp_path: Path) -> None:
    path, said = tmp_path / "layers.bin", list[str]()
    path.write_bytes(b"something else")
    with Recorder(path, 5, TOPOLOGY, said.append) as recorder:
        recorder.append(5, made(1)[0])
    assert numbers(path) == [5]
    assert (tmp_path / "layers.damaged.bin").read_bytes() == b"something else"
    assert "the record begins anew" in said[0]


class _Full:
    """A file on a full disk."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        self._file.write(data[:5])
        self._file.flush()
        raise OSError(28, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path: Path) -> None:
    path, said, steps = tmp_path / "layers.bin", list[str](), made(4)
    with Recorder(path, 1, TOPOLOGY, said.append) as recorder:
        for number, layers in islice(enumerate(steps, start=1), 2):
            recorder.append(number, layers)
        writer = recorder._writer
        assert writer is not None
        writer._file = _Full(writer._file)  # type: ignore[assignment]
        for number, layers in islice(enumerate(steps, start=1), 2, 4):
            recorder.append(number, layers)
    assert numbers(path) == [1, 2]
    assert list(LayersFile(path).frames())[-1].end == path.stat().st_size  # nothing of step 3 is left
    assert said == [f"{path}: cannot be written (No space left on device); it ends before step 3"]
