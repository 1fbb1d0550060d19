"""Every example runs, on two processes, and does what it says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hecate.examples import own_moe
from hecate.examples.shared import Text
from tests.adapters.parity import close
from tests.examples.launch import run


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", output)]


def test_own_moe() -> None:
    lines = Path(own_moe.__file__).read_text().splitlines()
    assert sum(1 for line in lines if line.strip()) < 40
    found = losses(run("hecate.examples.own_moe"))
    assert len(found) == 2  # a rank each
    assert all(loss < 0.1 for loss in found)  # 2 at random


def test_replay() -> None:
    output = run("hecate.examples.replay")
    found = losses(output)
    assert len(found) == 4
    assert found[-1] < found[0]
    pairs = re.findall(r"imbalance (\d+\.\d+) without, (\d+\.\d+) with", output)
    assert len(pairs) == 4
    assert all(float(after) <= 1.02 or float(after) < float(before) for before, after in pairs)


def test_finetune(tmp_path: Path) -> None:
    first = losses(run("hecate.examples.finetune", "--out", str(tmp_path / "a"), "--steps", "21"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokens = torch.stack([Text(128, 4)[i]["input_ids"] for i in range(4)])
    assert model(input_ids=tokens, labels=tokens).loss < math.log(256) - 0.8
    # On from there in one process.
    arguments = ("--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--steps", "1")
    again = losses(run("hecate.examples.finetune", *arguments, processes=1))
    assert again[0] < first[0] - 0.8
    assert (tmp_path / "b" / "config.json").exists()


@pytest.mark.long
def test_finetune_trainer(tmp_path: Path) -> None:
    output = run("hecate.examples.finetune_trainer", "--out", str(tmp_path), "--steps", "10")
    assert losses(output)[0] < math.log(256)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "checkpoint-10" / "fssdp" / "manifest.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10")


def test_the_trainer_trains_as_in_one_process(tmp_path: Path) -> None:
    for processes in (1, 2):
        run("tests.examples.runs", "--out", str(tmp_path / str(processes)), processes=processes)
    plain, sharded = (AutoModelForCausalLM.from_pretrained(tmp_path / str(n)).state_dict() for n in (1, 2))
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "1" / "random").state_dict()
    assert list(plain) == list(sharded)
    for name, value in plain.items():
        close(name, sharded[name] - start[name], value - start[name], 1e-3)


@pytest.mark.parametrize("name", ["muon", pytest.param("adafactor", marks=pytest.mark.long)])
def test_optimizer(name: str) -> None:
    found = losses(run(f"hecate.examples.{name}"))
    assert found[-1] < found[0] < math.log(256)
