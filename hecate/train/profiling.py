"""`profile=steps:10-12`: traces of a few steps by torch's profiler, with Hecate's labels (`hecate.labels`)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["PATTERN", "ProfileSteps", "Profiler"]

PATTERN = re.compile(r"steps:(\d+)-(\d+)(,all)?")


@dataclass(frozen=True)
class ProfileSteps:
    """Which steps to profile, and whether on all ranks."""

    first: int
    last: int
    everywhere: bool

    @classmethod
    def parse(cls, text: str, steps: int) -> ProfileSteps:
        """Read e.g. "steps:10-12" or "steps:10-12,all"; ValueError says what is wrong for a run of `steps` steps."""
        found = PATTERN.fullmatch(text)
        if found is None:
            raise ValueError(f"profile={text!r}: must be steps:FIRST-LAST or steps:FIRST-LAST,all, e.g. steps:10-12")
        first, last = int(found[1]), int(found[2])
        if not 1 <= first <= last <= steps:
            raise ValueError(f"profile={text!r}: must be steps in order, the first >= 1 and the last <= steps={steps}")
        return cls(first, last, found[3] is not None)


class Profiler:
    """Runs the profiler over the steps asked for, and writes `<folder>/rank<rank>.steps<first>-<last>.json.gz`.

    Profilers of Chrome and Perfetto open the file, and `hecate.report` shows the labels in it.

    Args:
        steps: what to profile, or None.
        folder: folder of the traces.
        rank: of this process.
        device: of this process.
        say: prints a line.
    """

    def __init__(
        self, steps: ProfileSteps | None, folder: Path, rank: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        wanted = steps is not None and (steps.everywhere or rank == 0)
        self._steps = steps if wanted else None
        self._folder, self._rank, self._device, self._say = folder, rank, device, say
        self._running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for step `number`; it is labelled "step <number>" in the trace."""
        steps = self._steps
        if steps is None or not steps.first <= number <= steps.last:
            yield
            return
        if self._running is None:
            self._running = self._started()
        with record_function(f"step {number}"):
            yield
            if number == steps.last and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # its kernels belong to the trace
        if number == steps.last:
            self._write(steps)

    def _started(self) -> profile:
        cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        started = profile(activities=[ProfilerActivity.CPU, *cuda])
        started.start()
        return started

    def _write(self, steps: ProfileSteps) -> None:
        assert self._running is not None
        done, self._running, self._steps = self._running, None, None
        done.stop()
        path = self._folder / f"rank{self._rank}.steps{steps.first}-{steps.last}.json.gz"
        partial = path.with_name(f".{path.name.removesuffix('.json.gz')}.part.json.gz")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(partial))
            os.replace(partial, path)
        except OSError as error:
            self._say(f"{path}: cannot be written ({error.strerror})")
        else:
            self._say(f"profile of steps {steps.first} to {steps.last}: {path}")

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop a profile that is not complete; nothing is written of it."""
        if self._running is not None:
            self._running.stop()
            self._running = None
