"""What a run writes of each step beside its metrics: layers, loads for `hecate.sim`, and a profile of a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from hecate.placement import Topology
from hecate.ranks.agree import agree
from hecate.train.distributed import World
from hecate.train.profiling import Profiler
from hecate.train.recorder import LoadsRecorder, Recorder
from hecate.train.settings import Settings

__all__ = ["Records", "records"]


@dataclass(frozen=True)
class Records:
    """Layers and loads are written by rank 0, profiles by the ranks that the settings name."""

    layers: Recorder | None
    trace: LoadsRecorder | None
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
            wanted = first and settings.trace
            trace = enter(LoadsRecorder(folder / "trace.npz", topology, experts, say)) if wanted else None
            return Records(layers, trace, enter(_profiler(settings, world, done, say)))

        yield agree(opened)


def _profiler(settings: Settings, world: World, done: int, say: Callable[[str], None]) -> Profiler:
    steps = settings.profile_steps
    if steps is not None and done >= steps.first:
        say(f"profile={settings.profile}: step {steps.first} is over, so nothing is profiled")
        steps = None
    return Profiler(steps, settings.folder / "profile", world.rank, world.device, say)
