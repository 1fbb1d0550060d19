"""What a run prints where nobody watches: lines by interval and time, and how fast a model is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hecate.models import GPTMoE
from hecate.train import progress as module
from hecate.train.progress import Progress, line
from hecate.train.settings import Settings
from hecate.train.work import Work, peak_tflops
from tests.train.configs import config


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 4000.0,
        "tflops": 800.0,
        "devices": 2,
        "imbalance_before": 1.5,
        "imbalance_after": 1.25,
        "imbalance_worst": 1.375,
        "worst_layer": "blocks.1.moe.experts",
        "memory_bytes": 2**21,
        "data_seconds": 0.002,
        "planning_seconds": 0.003,
        "mispredicted": 0.25,
        "why": "no copies: memory_slots=0",
    } | changes


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", text) for text in lines)
    return [text[20:] for text in lines]


def test_a_line_says_everything() -> None:
    assert line(metrics(1), peak=1000.0) == (
        "loss 2.5000  lr 1.00e-03  grad norm 0.500  4,000 tokens/s (2,000 and 400 TFLOP/s per device, MFU 40.0%)  "
        "imbalance 1.50 -> 1.25, worst 1.38 in blocks.1.moe.experts (no copies: memory_slots=0), 75% of loads "
        "predicted, planned in 3.0 ms  memory 2.0 MiB  data 2.0 ms"
    )
    assert "MFU" not in line(metrics(1))
    assert "experts, planned in 3.0 ms" in line(metrics(1, why=None, mispredicted=None))
    assert "4,000 tokens/s (2,000 per device)  imb" in line(metrics(1, tflops=None), peak=1000.0)


def test_lines_come_by_interval_and_by_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Progress(steps=12, done=0, interval=5, shown=True) as progress:
        for step in range(1, 13):
            now += 61.0 if step == 8 else 1.0
            progress.advance(metrics(step))
    assert [text.split()[1] for text in printed(capsys)] == ["1/12", "5/12", "8/12", "10/12", "12/12"]


def test_validation_and_skipped_steps_are_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(steps=9, done=0, interval=100, shown=True) as progress:
        progress.advance(metrics(1))
        progress.advance({"step": 2, "skipped": "step 2: NaN"})
        progress.advance(metrics(3, validation_loss=1.5))
        progress.advance(metrics(4, validation_loss=float("nan"), validation_non_finite="it is NaN"))
    assert printed(capsys)[1:] == ["skipped step 2: NaN", "step 3/9  validation loss 1.5000", "it is NaN"]


def test_only_one_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(steps=1, done=0, interval=1, shown=False) as progress:
        progress.advance(metrics(1))
    assert printed(capsys) == []


def test_work_counts_the_experts_that_a_token_uses() -> None:
    settings = Settings.from_config(config("model.num_experts=8", "model.top_k=2"))
    with torch.device("meta"):
        model = GPTMoE(settings.model)
        smaller = GPTMoE(Settings.from_config(config("model.num_experts=2", "model.top_k=2")).model)
    work, own = Work.of(model, 256), settings.model
    gates = own.num_layers * own.d_model * (8 - 2)  # a gate has a row for each expert
    assert work.parameters == sum(p.numel() for p in model.parameters())
    assert work.active == sum(p.numel() for p in smaller.parameters()) + gates
    embedding = own.vocab_size * own.d_model
    assert work.flops_per_token == 6 * (work.active - embedding) + 12 * own.num_layers * own.d_model * 256
    assert work.tflops(1e12) == work.flops_per_token


def test_work_of_a_model_that_does_not_tell_is_unknown() -> None:
    with torch.device("meta"):
        model = GPTMoE(Settings.from_config(config()).model)
    del model.config
    work = Work.of(model, 256)
    assert (work.experts, work.top_k, work.active, work.flops_per_token) == ((8,) * 4, None, None, None)
    assert work.tflops(1e12) is None


def test_peak_is_the_given_one_or_that_of_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert peak_tflops(cpu, None) is None
    assert peak_tflops(cpu, 2.0) == 2.0
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA GeForce", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(cuda, None) == peak
        assert peak_tflops(cuda, 500.0) == 500.0
