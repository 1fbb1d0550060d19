"""The trainer meets NaN: it skips the step on all ranks together, or all of them stop, and the log names the expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hecate.checkpoint.history import latest
from hecate.runtime.finite import NonFiniteError
from hecate.train.checkpoints import Position
from hecate.train.loggers import read_metrics
from hecate.train.loop import Trainer
from tests.faults.jobs import make_trainer, write_text
from tests.runtime.test_finite import EXPERT, row_of_expert
from tests.workers import Groups

STEPS, BAD = 7, 4
KINDS = ("weight before a router", "weight after the last router", "gradient")


@dataclass(frozen=True)
class End:
    """Of a run on one rank.

    Attributes:
        error: that ended it, or None.
        position: reached.
        state: weights and buffers.
        optimizer: state tensors of this rank.
    """

    error: str | None
    position: Position
    state: dict[str, Tensor]
    optimizer: list[Tensor]


class Accidental(Trainer):
    """Something of one expert, on the rank that owns it, is NaN in step `BAD`, or from then on."""

    def __init__(self, kind: str, lasting: bool, *args: Any) -> None:
        super().__init__(*args)
        self.kind, self.lasting = kind, lasting

    def step(self) -> dict[str, Any]:
        bad = self.position.step + 1 == BAD
        layer = {KINDS[0]: 0, KINDS[1]: 1}.get(self.kind)
        row = None if layer is None else row_of_expert(self, layer, lambda parameter: parameter)  # type: ignore[arg-type]
        before = None if row is None else row.clone()
        if bad and row is not None:
            row[0, 0] = torch.nan
        metrics = super().step()
        if bad and row is not None and before is not None and not self.lasting:
            row.copy_(before)
        return metrics

    def _micro_batch(self, micro: int) -> Tensor:
        losses = super()._micro_batch(micro)
        if self.kind == KINDS[2] and self.position.step + 1 == BAD:
            row = row_of_expert(self, 0, lambda parameter: parameter.grad)  # type: ignore[arg-type]
            if row is not None:
                row[0, 0] = torch.nan
        return losses


def run(kind: str, lasting: bool, root: str, *overrides: str) -> End:
    """A run in the processes of the test group."""
    trainer = make_trainer(partial(Accidental, kind, lasting), root, f"steps={STEPS}", *overrides)
    error = None
    try:
        trainer.train()
    except NonFiniteError as raised:
        error = str(raised)
    moments = [v.detach().clone() for state in trainer.optimizer.state.values() for v in state.values()]
    local = [m.to_local() if hasattr(m, "to_local") else m for m in moments]
    return End(error, trainer.position, trainer.engine.full_state_dict(), local)


def names(kind: str) -> str:
    """What the log has to say."""
    if kind == KINDS[2]:
        return f"gradient of blocks.0.moe.experts.up, expert {EXPERT}"
    return f"blocks.{KINDS.index(kind)}.moe.experts.up, expert {EXPERT}"


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_skipped_on_all_ranks_together(groups: Groups, tmp_path: Path, kind: str, dense: str) -> None:
    write_text(tmp_path)
    overrides = ("name=skip", f"fssdp.dense={dense}", "save_interval=2", "accumulate=2")
    ranks: list[End] = groups(2).run(run, kind, False, str(tmp_path), *overrides)
    metrics = read_metrics(tmp_path / "skip" / "metrics.jsonl")
    assert [m["step"] for m in metrics if "loss" in m] == [step for step in range(1, STEPS + 1) if step != BAD]
    assert names(kind) in metrics[BAD - 1]["skipped"]
    for end in ranks:
        assert end.error is None
        assert end.position == Position(STEPS, STEPS * 2 * 2 * 4)
        assert all(torch.isfinite(value).all() for value in (*end.state.values(), *end.optimizer))
        assert all(torch.equal(value, ranks[0].state[name]) for name, value in end.state.items())
        steps = {float(value) for value in end.optimizer if value.ndim == 0}
        assert steps == {STEPS - 1.0}


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
@pytest.mark.parametrize("kind", KINDS)
def test_run_stops_on_all_ranks(groups: Groups, tmp_path: Path, kind: str, dense: str) -> None:
    write_text(tmp_path)
    overrides = ("name=stop", f"fssdp.dense={dense}", "save_interval=2", "on_non_finite=stop")
    ranks: list[End] = groups(2).run(run, kind, False, str(tmp_path), *overrides)
    assert ranks[0].error == ranks[1].error
    assert ranks[0].error is not None
    assert f"step {BAD}: NaN or infinite: " in ranks[0].error
    assert names(kind) in ranks[0].error
    assert "on_non_finite=stop" in ranks[0].error
    assert latest(tmp_path / "stop" / "checkpoints") == tmp_path / "stop" / "checkpoints" / "step-00000002"


def test_run_stops_where_it_does_not_recover(groups: Groups, tmp_path: Path) -> None:
    write_text(tmp_path)
    ranks: list[End] = groups(2).run(run, KINDS[1], True, str(tmp_path), "name=lost", "max_skipped=2")
    for end in ranks:
        assert end.error is not None
        assert names(KINDS[1]) in end.error
        assert f"step {BAD + 2}:" in end.error
        assert "3 steps in a row, max_skipped=2" in end.error
