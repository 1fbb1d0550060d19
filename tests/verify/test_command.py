"""`python -m hecate.verify`, and that the function and the package of that name go together."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hecate.verify.__main__ import run
from hecate.verify.command import read_settings, shrunk
from tests import forked
from tests.adapters.tiny import tiny_config, tiny_model

CPU = torch.device("cpu")
QUICK = ["steps=1", "accumulate=1", "policies=ep"]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_help_without_a_warning() -> None:
    done = python("-W", "error", "-m", "hecate.verify", "--help")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "model=PATH" in done.stdout


def test_name_is_the_function_and_the_package() -> None:
    code = (
        "import inspect, sys, hecate\n"
        "import hecate.verify.run, hecate.verify\n"
        "from hecate.verify import Report, verify\n"
        "from hecate.verify.run import verify as again\n"
        "assert inspect.isfunction(hecate.verify) and hecate.verify is verify is again\n"
        "assert inspect.ismodule(sys.modules['hecate.verify'])\n"
        "assert 'hecate.verify.__main__' not in sys.modules\n"
    )
    done = python("-W", "error::RuntimeWarning", "-c", code)
    assert done.returncode == 0, done.stderr


def test_settings() -> None:
    assert read_settings(["a=1", "b=x", "c=[1, 2]", "d=null", "e=a=b", "f=True"]) == {
        "a": 1,
        "b": "x",
        "c": [1, 2],
        "d": None,
        "e": "a=b",
        "f": True,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps"], "'steps': must be key=value, each key once"),
        (["model=x", "model=y"], "'model=y': must be key=value, each key once"),
        (["steps=1"], "model=FOLDER is missing"),
        (["model=/nowhere"], "model=/nowhere: must be a folder with a config.json"),
        (["model=FOLDER", "layers=2"], "layers: not in this Qwen3MoeConfig; it has .*num_hidden_layers"),
        (["model=FOLDER", "dtype=float16"], "dtype=float16: must be one of float64"),
        (["model=FOLDER", "optimizer=lion"], "optimizer=lion: must be one of adamw, sgd"),
        (["model=FOLDER", "policies=best"], "policies=.'best'.: must be at least one of"),
        (["model=FOLDER", "fssdp.slots=2"], "fssdp.slots: no such field; there are policy,"),
        (["model=FOLDER", "steps=none"], "steps='none': must be an integer >= 1"),
    ],
)
def test_refused(words: list[str], message: str, tmp_path: Path) -> None:
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        run([word.replace("FOLDER", str(tmp_path)) for word in words], CPU)


def test_wrong_command_ends_with_2(tmp_path: Path) -> None:
    done = forked.run("-m", "hecate.verify", f"model={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == f"error: model={tmp_path}: must be a folder with a config.json, or such a file\n"


def test_shrunk_states_what_it_changed() -> None:
    config = tiny_config("lfm2_moe", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    small, said = shrunk(config, {"num_hidden_layers": 2, "num_experts": 4})
    assert (small.num_hidden_layers, small.num_experts, small.layer_types) == (2, 4, ["conv", "full_attention"])
    assert said[:2] == ("num_hidden_layers=2 (was 3)", "num_experts=4 (was 8)")
    assert "layer_types cut to 2 entries" in said


def test_folder_with_weights(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    report = run([f"model={tmp_path}", *QUICK], CPU)
    assert report.ok, str(report)
    assert report.notes[0] == "weights are read from the folder"


def test_file_of_a_config_with_overrides(tmp_path: Path) -> None:
    tiny_config("mixtral").save_pretrained(tmp_path)
    words = [f"model={tmp_path / 'config.json'}", "num_hidden_layers=1", "optimizer=sgd", "fssdp.pools=layer"]
    report = run([*words, *QUICK], CPU)
    assert report.ok, str(report)
    assert "1 MoE layer of 8 experts" in report.title
    assert "SGD" in report.title
    assert {"weights are random", "num_hidden_layers=1 (was 2)"} <= set(report.notes)
    assert re.search(r"^policy ep ", str(report), flags=re.MULTILINE)
