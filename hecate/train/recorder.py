"""Records the layers of every step for `hecate.report` and loads for `hecate.sim`.

A disk that is full ends the record, not the run.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hecate.loads.trace import TraceWriter
from hecate.placement import Topology
from hecate.report.record import LayersWriter, RecordedStep

__all__ = ["LoadsRecorder", "Recorder"]

NO_MORE = "no further loads are recorded"
Writer = TypeVar("Writer")


class _UntilFull(Generic[Writer]):
    """A file that is written until that fails, which is said once.

    Args:
        path: the file.
        say: prints a line.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._writer: Writer | None = None

    def _try(self, action: Callable[[Writer], None], lost: str) -> None:
        """Call `action` with the writer; if the file cannot be written, say so and what is lost by it."""
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            self._writer = None
            self._say(f"{self._path}: cannot be written ({error.strerror}); {lost}")


class Recorder(_UntilFull[LayersWriter]):
    """Writes `layers.bin`; used by rank 0, as a context manager.

    A damaged file of an earlier process is put aside as `layers.damaged.bin`, and said.

    Args:
        path: the file.
        first_step: number of the next step; what is recorded from it on is replaced.
        topology: of the devices.
        say: prints a line.
    """

    def __init__(self, path: Path, first_step: int, topology: Topology, say: Callable[[str], None]) -> None:
        super().__init__(path, say)
        self._topology = topology
        try:
            self._writer = self._opened(first_step)
        except OSError as error:
            say(f"{path}: cannot be written ({error.strerror}); nothing is recorded")

    def _opened(self, first_step: int) -> LayersWriter:
        try:
            return LayersWriter(self._path, first_step)
        except ValueError as error:
            aside = self._path.with_suffix(".damaged.bin")
            self._say(f"{error}; the record begins anew, the old one is {aside.name}")
            self._path.rename(aside)
            return LayersWriter(self._path, first_step)

    def append(self, step: int, layers: Sequence[Mapping[str, Any]]) -> None:
        """Record the `layers` of `FSSDP.stats()` after a step."""
        self._try(
            lambda writer: writer.append(RecordedStep.of(step, self._topology, layers)), f"it ends before step {step}"
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)


class LoadsRecorder(_UntilFull[TraceWriter]):
    """Writes `trace.npz`; used by rank 0, as a context manager.

    A file to which a process wrote when it was killed is put aside as `trace.damaged.npz`.

    Args:
        path: the file.
        topology: of the devices.
        experts: number of experts of each MoE layer.
        say: prints a line.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it holds the loads of another model or of other devices.
    """

    def __init__(self, path: Path, topology: Topology, experts: Sequence[int], say: Callable[[str], None]) -> None:
        super().__init__(path, say)
        if path.exists() and not zipfile.is_zipfile(path):
            path.rename(path.with_suffix(".damaged.npz"))
        self._writer = TraceWriter(path, topology, experts)

    def append(self, step: int, counts: Sequence[NDArray[np.int64]]) -> None:
        """Record a step: int64 `[num_devices, num_experts]` per layer. Some steps are written together."""
        self._try(lambda writer: writer.append(step, counts), NO_MORE)

    def flush(self) -> None:
        """Write what is not written yet."""
        self._try(TraceWriter.flush, NO_MORE)

    def __enter__(self) -> LoadsRecorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()
