"""Every run of a verification: the plain one, and each way under Hecate compared with it as it goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from hecate.errors import MissingRankError
from hecate.ranks.agree import agree, gather, on_rank_0
from hecate.verify.compare import Comparison
from hecate.verify.plain import Trace, first_step, trace
from hecate.verify.report import START, WHOLE_RUN, Row
from hecate.verify.sharded import Sharded
from hecate.verify.task import Task
from hecate.verify.ways import Recompute, Way

__all__ = ["Runs", "start_row"]


@dataclass(frozen=True)
class Runs:
    """Trains the plain model, then in each way, and compares.

    Attributes:
        task: what is trained.
        parts: original name of each parameter -> its part, see `compare.parts`.
        tolerance: largest error that counts as equal.
        mesh: as `fully_shard` takes it.
        recompute: switches activation checkpointing on.
        checkpoint: folder to save to, on a file system that all ranks share.
    """

    task: Task
    parts: Mapping[str, str]
    tolerance: float
    mesh: DeviceMesh | None
    recompute: Recompute | None
    checkpoint: Path

    def compare(self, every: Iterable[Way]) -> tuple[tuple[Row, ...], dict[str, dict[str, int]]]:
        """Rows of the plain model and of every way, and what the ways did (`Report.activity`). Collective."""
        plain = agree(lambda: on_rank_0(lambda: trace(self.task)))
        rows, activity = self._repeated(plain), {}
        if all(row.ok for row in rows):
            for way in every:
                more, activity[way.name] = self._way(way, plain)
                rows += more
        return rows, activity

    def _repeated(self, plain: Trace | None) -> tuple[Row, ...]:
        """The first step of the plain model made twice: if it does not repeat itself, nothing can be compared."""
        comparison = Comparison("plain, again", self.parts, self.tolerance)
        again = agree(lambda: on_rank_0(lambda: first_step(self.task)))
        if plain is not None and again is not None:
            comparison.step(0, again, plain.steps[0])
        return gather(comparison.rows)[0]

    def _way(self, way: Way, plain: Trace | None) -> tuple[tuple[Row, ...], dict[str, int]]:
        """Rows and activity of one way."""
        comparison = Comparison(way.name, self.parts, self.tolerance)
        run = agree(lambda: Sharded(self.task, way, self.mesh, self.recompute))
        try:
            with closing(run):
                self._train(run, way, comparison, plain)
        except MissingRankError:
            raise
        except Exception as error:
            failed = Row(way.name, WHOLE_RUN, math.inf, f"{type(error).__name__}: {error}", self.tolerance)
            return (*gather(comparison.rows)[0], failed), {}
        return gather(comparison.rows)[0], {"copies": run.copies, "moved": run.moved}

    def _train(self, run: Sharded, way: Way, comparison: Comparison, plain: Trace | None) -> None:
        """Run all steps; an error that one rank raises in a step is raised on all ranks after that step."""
        for number in range(self.task.steps):
            agree(partial(self._step, run, way, number, comparison, plain))
        agree(lambda: self._weights(run, comparison, plain))

    def _step(self, run: Sharded, way: Way, number: int, comparison: Comparison, plain: Trace | None) -> None:
        """Run one step and compare it; only rank 0 has the plain run to compare with."""
        step = run.step(number)
        if plain is not None:
            comparison.step(number, step, plain.steps[number])
        if way.reload and number == (self.task.steps - 1) // 2:
            saved = run.weights()
            run.reload(self.checkpoint)
            comparison.bits("reloaded weights", f"step {number}", run.weights(), saved)

    def _weights(self, run: Sharded, comparison: Comparison, plain: Trace | None) -> None:
        weights = run.weights()
        if plain is not None:
            trained = {name: weights[name] for name in plain.weights if name in weights}
            comparison.tensors("weights", f"after step {self.task.steps - 1}", trained, plain.weights)


def start_row(model: nn.Module, weights: Mapping[str, str]) -> Row:
    """Compare the weights that each rank's model starts from with those of rank 0. Collective.

    Args:
        model: the model of this rank.
        weights: digests of its weights.
    """
    everywhere = gather(weights)
    names = dict.fromkeys(name for there in everywhere for name in there)
    differing = [name for name in names if len({there.get(name) for there in everywhere}) > 1]
    state, comparison = model.state_dict(), Comparison(START, {}, 0.0)
    for name in differing or list(names)[:1]:
        values = gather({name: state[name].cpu()} if name in state else {})
        for rank, there in enumerate(values):
            comparison.bits("weights at start", f"rank {rank}", there, values[0])
    return comparison.rows[0]
