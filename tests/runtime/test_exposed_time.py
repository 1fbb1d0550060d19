"""The time that compute waits for communication, measured by events of a stand-in for the device."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from hecate.runtime.comms import WHOLE_STEP, ExposedTime


class Device:
    """Records events in the order of `record`; `run` passes some of them, each 1 ms after the one before."""

    def __init__(self) -> None:
        self.recorded: list[Event] = []
        self.made = self.passed = self.synchronized = 0

    def run(self, number: int) -> None:
        for _ in range(min(number, len(self.recorded))):
            self.passed += 1
            self.recorded.pop(0).at = float(self.passed)

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at: float | None = None

    def record(self) -> None:
        assert self not in self.device.recorded, "recorded again while the device still has to pass it"
        self.at = None
        self.device.recorded.append(self)

    def query(self) -> bool:
        return self.at is not None

    def synchronize(self) -> None:
        if self in self.device.recorded:
            self.device.synchronized += 1
            self.device.run(self.device.recorded.index(self) + 1)

    def elapsed_time(self, end: Event) -> float:
        assert self.at is not None
        assert end.at is not None
        return end.at - self.at


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    with mock.patch.object(torch.cuda, "Event", made.event):
        yield made


def wait(exposed: ExposedTime, layer: int = 0) -> None:
    exposed.wait(layer, lambda: None, on_cuda=True)


def test_without_steps_events_are_used_again(device: Device) -> None:
    exposed = ExposedTime()
    for _ in range(1000):
        wait(exposed)
        device.run(1)
        device.run(1)
    assert device.made == 2
    assert device.synchronized == 0
    assert exposed.now.seconds(0) == pytest.approx(1.0)


def test_there_are_as_many_events_as_the_device_is_behind(device: Device) -> None:
    exposed = ExposedTime()
    for _ in range(500):
        for _ in range(8):
            wait(exposed)
        device.run(15)  # not the last one of the eight
        device.run(1)
    assert device.made == 16
    assert device.synchronized == 0


def test_the_end_of_a_step_waits_for_nothing_and_each_step_has_its_times(device: Device) -> None:
    exposed = ExposedTime()
    wait(exposed, 0)
    wait(exposed, 1)
    first = exposed.take()
    wait(exposed, 1)
    second = exposed.take()
    wait(exposed, 1)
    assert device.synchronized == device.passed == 0
    assert first.seconds(1) == pytest.approx(1e-3)
    assert device.passed == 4, "only the waits of the step itself are waited for"
    assert first.seconds(0) == pytest.approx(1e-3)
    assert (second.seconds(0), second.seconds(1)) == (0.0, pytest.approx(1e-3))
    assert device.passed == 6
    assert exposed.now.seconds(1) == pytest.approx(1e-3)
    assert exposed.take().seconds(1) == pytest.approx(1e-3)
    assert exposed.now.seconds(1) == 0.0


def test_on_the_cpu_the_host_waits() -> None:
    exposed, ran = ExposedTime(), []
    exposed.wait(2, lambda: ran.append(1), on_cuda=False)
    assert ran == [1]
    assert exposed.now.seconds(2) > 0
    assert exposed.now.seconds(0) == 0.0


def test_times_of_the_host_are_told_apart_from_waits_of_the_device(device: Device) -> None:
    exposed = ExposedTime()
    exposed.wait(1, lambda: None, True, "reduce")
    with exposed.on_host("plan", 1, "layer"), exposed.on_host("reshard"):
        pass
    device.run(2)
    assert list(exposed.now.by_verb(1)) == ["plan", "reduce"]
    assert exposed.now.seconds(1) == exposed.now.by_verb(1)["reduce"] == pytest.approx(1e-3)
    assert list(exposed.now.by_verb(WHOLE_STEP)) == ["reshard"]
