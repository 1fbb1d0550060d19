"""If the trainer finds NaN, all ranks skip the step together, or all stop, and the log names the expert."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hecate.checkpoint.history import latest
from hecate.errors import NonFiniteError
from hecate.train import loggers
from hecate.train.checkpoints import Position
from hecate.train.loggers import read_metrics
from hecate.train.loop import Trainer
from tests.faults.jobs import make_trainer, write_text
from tests.values.experts import EXPERT, row_of_expert
from tests.workers import Groups

STEPS, BAD = 7, 4
KINDS = ("weight before a router", "weight after the last router", "gradient")


@dataclass(frozen=True)
class End:
    """How a run ended on one rank.

    Attributes:
        error: the error that ended it, or None.
        position: the position in the data that it reached.
        state: weights and buffers.
        optimizer: state tensors of this rank.
    """

    error: str | None
    position: Position
    state: dict[str, Tensor]
    optimizer: list[Tensor]


class Accidental(Trainer):
    """Makes a tensor of one expert NaN, on the rank that owns it, in step `BAD` or from then on."""

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


class BadValidation(Trainer):
    """Makes a weight of one expert NaN, on the rank that owns it, in each validation but the last."""

    def __init__(self, kind: str, *args: Any) -> None:
        super().__init__(*args)
        self.kind = kind

    def validate(self) -> dict[str, Any]:
        row = row_of_expert(self, KINDS.index(self.kind), lambda parameter: parameter)  # type: ignore[arg-type]
        if row is None or self.position.step == STEPS:
            return super().validate()
        before = row.clone()
        row[0, 0] = torch.nan
        try:
            return super().validate()
        finally:
            row.copy_(before)


class Recorder:
    """A logger that records how it was closed."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / "closed"

    def log(self, metrics: Mapping[str, Any]) -> None:
        pass

    def keep(self, files: Sequence[Path]) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        self.path.write_text(f"failed={failed}")


def run(kind: str, lasting: bool, root: str, *overrides: str) -> End:
    """Make a run in the processes of the test group."""
    return end_of(make_trainer(partial(Accidental, kind, lasting), root, f"steps={STEPS}", *overrides))


def run_with_validation(kind: str, root: str, *overrides: str) -> End:
    """Make a run in which weights are NaN during validation."""
    return end_of(make_trainer(partial(BadValidation, kind), root, f"steps={STEPS}", *overrides))


def end_of(trainer: Trainer) -> End:
    error = None
    try:
        with patch.object(loggers, "TensorBoard", Recorder):
            trainer.train()
    except NonFiniteError as raised:
        error = str(raised)
    moments = [v.detach().clone() for state in trainer.optimizer.state.values() for v in state.values()]
    local = [m.to_local() if hasattr(m, "to_local") else m for m in moments]
    return End(error, trainer.position, trainer.engine.full_state_dict(), local)


def names(kind: str) -> str:
    """What the log must contain."""
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
    overrides = ("name=stop", f"fssdp.dense={dense}", "save_interval=2", "on_non_finite=stop", "logger=tensorboard")
    ranks: list[End] = groups(2).run(run, kind, False, str(tmp_path), *overrides)
    assert ranks[0].error == ranks[1].error
    assert ranks[0].error is not None
    assert f"step {BAD}: NaN or infinite: " in ranks[0].error
    assert names(kind) in ranks[0].error
    assert "on_non_finite=stop" in ranks[0].error
    assert latest(tmp_path / "stop" / "checkpoints") == tmp_path / "stop" / "checkpoints" / "step-00000002"
    assert (tmp_path / "stop" / "closed").read_text() == "failed=True"


def test_run_stops_where_it_does_not_recover(groups: Groups, tmp_path: Path) -> None:
    write_text(tmp_path)
    ranks: list[End] = groups(2).run(run, KINDS[1], True, str(tmp_path), "name=lost", "max_skipped=2")
    for end in ranks:
        assert end.error is not None
        assert names(KINDS[1]) in end.error
        assert f"step {BAD + 2}:" in end.error
        assert "3 steps in a row, max_skipped=2" in end.error


@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_validation_is_logged_by_layer_and_training_goes_on(groups: Groups, tmp_path: Path, dense: str) -> None:
    write_text(tmp_path)
    common = ("validation.interval=3", "save_interval=0", f"fssdp.dense={dense}")
    for kind in KINDS[:2]:
        ends = groups(2).run(run_with_validation, kind, str(tmp_path), f"name=run{KINDS.index(kind)}", *common)
        assert [end.error for end in ends] == [None, None]
        metrics = read_metrics(tmp_path / f"run{KINDS.index(kind)}" / "metrics.jsonl")
        found = {m["step"]: m["validation_non_finite"] for m in metrics if "validation_non_finite" in m}
        assert list(found) == [3, 6]
        assert all(f"validation after step {step}: " in text and names(kind) in text for step, text in found.items())
        assert all(math.isnan(metrics[step - 1]["validation_loss"]) for step in found)
        assert [m["step"] for m in metrics if "loss" in m] == list(range(1, STEPS + 1))
    before, after = ([m["loss"] for m in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("run0", "run1"))
    assert before == after  # a pass that raised leaves nothing behind
    assert math.isfinite(json.loads((tmp_path / "run0" / "summary.json").read_text())["val_bits_per_token"])


def test_validation_ends_the_run_where_that_is_asked_for(groups: Groups, tmp_path: Path) -> None:
    write_text(tmp_path)
    overrides = ("name=stop", "validation.interval=3", "save_interval=2", "on_non_finite=stop")
    ranks: list[End] = groups(2).run(run_with_validation, KINDS[0], str(tmp_path), *overrides)
    for end in ranks:
        assert end.error is not None
        assert end.error == ranks[0].error
        assert "validation after step 3: NaN or infinite: blocks.1.moe.experts: the router of rank" in end.error
        assert names(KINDS[0]) in end.error
        assert "on_non_finite=stop ends the run" in end.error
    assert latest(tmp_path / "stop" / "checkpoints") == tmp_path / "stop" / "checkpoints" / "step-00000002"
