"""What a run writes of each step beside its metrics: layers, loads for `hecate.sim`, and a profile of a few steps."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.loads.trace import TraceWriter
from hecate.placement import Topology
from hecate.ranks.agree import agree
from hecate.train.distributed import World
from hecate.train.profiling import Profiler
from hecate.train.recorder import Recorder
from hecate.train.settings import Settings

__all__ = ["Records", "records"]


@dataclass(frozen=True)
class Records:
    """Layers and loads are written by rank 0, profiles by the ranks that the settings name."""

    layers: Recorder | None
    trace: TraceWriter | None
    profiler: Profiler

    def profiled(self, step: int) -> AbstractContextManager[None]:
        """A context for a step."""
        return self.profiler.step(step)

    def append(self, step: int, layers: Sequence[Mapping[str, Any]]) -> None:
        """Record a step that was taken, with the `layers` of `FSSDP.stats()` after it."""
        if self.layers is not None:
            self.layers.append(step, layers)
        if self.trace is not None:
            self.trace.append(step, [layer["counts"] for layer in layers])

    def flush(self) -> None:
        """Write what is buffered."""
        if self.trace is not None:
            self.trace.flush()


@contextmanager
def records(
    settings: Settings, world: World, experts: Sequence[int], done: int, say: Callable[[str], None]
) -> Iterator[Records]:
    """The records of the steps after `done`, open during the block. If one cannot be opened, all ranks raise.

    Args:
        settings: the settings of the run.
        world: this process.
        experts: number of experts of each MoE layer.
        done: steps that were made before.
        say: prints a line.
    """
    folder, topology, first = settings.folder, Topology.detect(world.size), world.rank == 0
    with ExitStack() as stack:

        def opened() -> Records:
            enter = stack.enter_context
            layers = enter(Recorder(folder / "layers.bin", done + 1, topology, say)) if first else None
            trace = enter(_trace(folder / "trace.npz", topology, experts)) if first and settings.trace else None
            return Records(layers, trace, enter(_profiler(settings, world, done, say)))

        yield agree(opened)


def _trace(path: Path, topology: Topology, experts: Sequence[int]) -> TraceWriter:
    if path.exists() and not zipfile.is_zipfile(path):  # a process was killed while it wrote to it
        path.rename(path.with_suffix(".damaged.npz"))
    return TraceWriter(path, topology, experts)


def _profiler(settings: Settings, world: World, done: int, say: Callable[[str], None]) -> Profiler:
    steps = settings.profile_steps
    if steps is not None and done >= steps.first:
        say(f"profile={settings.profile}: step {steps.first} is over, so nothing is profiled")
        steps = None
    return Profiler(steps, settings.folder / "profile", world.rank, world.device, say)
