"""DeepSpeed trains the dense part: the result is that of the plain model, and checkpoints fit any other dense part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hecate.train.loggers import read_metrics
from tests.faults.jobs import TINY, own_environment, write_text
from tests.integrations import zero_runs
from tests.workers import Groups

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'hecate-moe[deepspeed]'")


@pytest.mark.parametrize("stage", [1, 2])
def test_equals_the_plain_model(groups: Groups, stage: int) -> None:
    groups(2).run(zero_runs.equals_the_plain_model, stage)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_equals_the_plain_model_under_activation_checkpointing(groups: Groups, use_reentrant: bool) -> None:
    groups(2).run(zero_runs.equals_under_checkpointing, 2, use_reentrant)


@pytest.mark.parametrize(("before", "after"), [(1, 0), (2, 0), (0, 1), (0, 2), (2, 1)])
def test_a_checkpoint_of_one_dense_part_is_continued_with_another(
    groups: Groups, before: int, after: int, tmp_path: Path
) -> None:
    groups(2).run(zero_runs.goes_on_from_a_checkpoint, str(tmp_path), before, after)


def test_master_weights_of_bfloat16(groups: Groups, tmp_path: Path) -> None:
    groups(2).run(zero_runs.keeps_float32_masters, str(tmp_path / "saved"))


@pytest.mark.parametrize("stage", [1, 2])
def test_steps_are_skipped_whole(groups: Groups, stage: int) -> None:
    groups(2).run(zero_runs.skips_what_is_not_finite, stage)


def test_what_would_go_wrong_without_a_word_is_refused(groups: Groups) -> None:
    expected = (
        "call hecate.integrations.deepspeed.initialize before",
        "zero_optimization.stage=3: must be 1 or 2",
        "fp16.enabled=True",
        "bf16.enabled=True: must be False with FSSDPConfig.param_dtype=None",
        "gradient_clipping=1.0: must be 0",
        "gradient_accumulation_steps=4: must be 1",
        "optimizer={'type': 'Adam'}: must be absent",
        "zero_optimization.offload_optimizer",
        "the optimizer lacks",
        "call what hecate.integrations.deepspeed.initialize returned, not the model",
        "the last forward pass had no backward pass yet",
        "must be outside of no_sync()",
        "call optimizer.step() of the optimizer",
        "save_checkpoint does not know of the experts",
        "requires_grad of blocks.0.moe_norm.bias is False, it was True",
    )
    for said in groups(2).run(zero_runs.refusals):
        assert len(said) == len(expected)
        for text, message in zip(expected, said, strict=True):
            assert text in message


@pytest.mark.long  # DeepSpeed compiles an operation first
def test_its_launcher_starts_the_trainer_and_the_run_goes_on_under_fsdp(tmp_path: Path) -> None:
    write_text(tmp_path)
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    options = ("--num_accelerators", "2", "--master_addr", "127.0.0.1", "--no_local_rank", "--module", "hecate.train")
    given = (f"data.path={tmp_path / 'text'}", *TINY, "name=run", "save_interval=2")
    environment = {
        **own_environment(),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for start in (
        (sys.executable, launcher, *options, *given, "dense=deepspeed", "steps=4"),
        (sys.executable, "-m", "hecate.train", *given, "devices=2", "steps=6"),
    ):
        done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from step 4 of 6" in done.stdout
    assert [m["step"] for m in read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")] == list(range(1, 7))
