"""Files and command lines: every file is valid, and what is wrong is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen3MoeConfig

from hecate.checkpoint.folder import replace_file
from hecate.cost import CostModel
from hecate.loads.trace import TraceWriter
from hecate.placement import Topology
from hecate.sim.clock import fit
from hecate.sim.conf import cluster_named, conf_dir, model_named, names_of, read_task
from hecate.sim.files import check_writable
from hecate.sim.model import from_transformers
from hecate.sim.settings import Settings
from tests.sim.small import cluster

SIZES = {  # billions of weights, as their makers say; the paper's without the vocabulary
    "gpt_moe_s": 1.84,
    "gpt_moe_l": 7.36,
    "bert_moe": 3.27,
    "bert_moe_deep": 6.54,
    "mixtral_8x7b": 46.7,
    "qwen3_30b_a3b": 30.5,
    "qwen3_235b_a22b": 235,
    "deepseek_v3": 671,
    "glm_4_5": 355,
    "kimi_k2": 1030,
}


def test_models_have_the_size_that_their_makers_say() -> None:
    assert set(names_of("model")) == set(SIZES)
    for name, billions in SIZES.items():
        model = model_named(name)
        own = model.weights - (model.outer_weights if "moe" in name else 0)
        assert own / 1e9 == pytest.approx(billions, rel=0.02), name


def test_clusters_can_be_resized_and_say_where_each_number_comes_from() -> None:
    for name in names_of("cluster"):
        assert cluster_named(name, 2 * cluster_named(name).devices).devices == 2 * cluster_named(name).devices
    for path in conf_dir().glob("*/*.yaml"):
        for line in path.read_text().splitlines():
            assert "# " in line, f"{path.name}: {line}"


def test_a_transformers_config_is_counted() -> None:
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=100,
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=3,
    )
    model = from_transformers(config)
    assert (model.num_layers, model.num_experts, model.top_k, model.expert_weights) == (2, 6, 3, 3 * 64 * 48)
    assert (model.outer_weights, model.head_weights, model.heads) == (2 * 100 * 64, 100 * 64, 64)
    attention = 64 * 64 * 2 + 2 * 64 * 32
    assert model.dense_weights == pytest.approx(attention + 6 * 64 + 2 * 64, rel=0.02)


def test_a_profile_serves_the_simulator_and_training(tmp_path: Path) -> None:
    place = cluster(name="mine")
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"cluster": asdict(place), "cost": asdict(place.cost), "measured": {}}))
    assert cluster_named(str(path)) == place
    assert read_task([f"cluster={path}", "devices=8"]).cluster == place.resized(8)
    assert CostModel.load(path) == place.cost


def test_fits_are_never_negative() -> None:
    rows = [[1000, 10, 1], [4000, 10, 1], [1000, 80, 1], [9000, 40, 2]]
    assert fit(rows, [2 * a + 3 * b + 50 * c for a, b, c in rows]) == pytest.approx([2, 3, 50])
    fitted = fit(rows, [2 * a - b for a, b, _ in rows])
    assert min(fitted) >= 0
    assert fitted[0] == pytest.approx(2, rel=0.05)


def damaged(folder: Path) -> str:
    path = folder / "damaged.npz"
    with TraceWriter(path, Topology(2, 1), [4]) as trace:
        trace.append(0, [np.ones((2, 4), dtype=np.int64)])
    path.write_bytes(path.read_bytes()[:-30])
    return str(path)


def profile(folder: Path, **changes: object) -> str:
    path = folder / "profile.json"
    values = {k: v for k, v in (asdict(cluster()) | changes).items() if v is not None}
    path.write_text(json.dumps({"cluster": values}))
    return str(path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model=gpt5", "model=gpt5: must be .* or one of bert_moe, .*qwen3_30b_a3b"),
        ("cluster=tpu", "cluster=tpu: must be .* or one of emulated, .*paper_b"),
        ("polcy=ep", "no key 'polcy'.*did you mean policy"),
        ("cluster.devicess=2", "no key 'devicess'.*did you mean devices"),
        ("policy=best", "policy='best': must be one of"),
        ("devices=0", "devices=0, must be an integer >= 1"),
        ("devices=12", "devices=12 must be a multiple of devices_per_node=8"),
        ("tokens=0", "tokens=0: must be an integer >= 1"),
        ("replicas=0", "replicas=0: must be an integer >= 1"),
        ("foreseen=1", "foreseen=1: must be one of True, False"),
        ("rematerialize=maybe", "rematerialize='maybe': must be one of True, False"),
        ("memory_slots=auto", "memory_slots='auto': must be an integer >= 0"),
        ("memory_slots=-1", "memory_slots=-1: must be an integer >= 0"),
        ("max_imbalance=0.5", "max_imbalance=0.5: must be a number >= 1"),
        ("loads.kind=wild", "loads.kind='wild': must be one of"),
        ("loads.exponent=-1", r"loads.exponent=-1: must be a number in \[0, 100\]"),
        ("trace=nowhere.npz", "trace=nowhere.npz: no such file"),
        ("balanced", "'balanced': must be key=value"),
    ],
)
def test_refuses_what_is_wrong(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_task([word])


def test_refuses_what_training_refuses() -> None:
    for words, message in (
        (["policy=smartmoe", "reshard_interval=0"], "^policy='smartmoe' only changes owners"),
        (["policy=flexmoe"], "^policy='flexmoe': copies that stay, with optimizer state, are not simulated"),
        (["policy=exact", "calibrate=false"], "^policy='exact' copies experts only after the gate"),
        (["policy=fsdp", "load_window=0"], "^load_window=0: must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_task(words)
    for wrong in ({"foreseen": "no"}, {"rematerialize": "off"}, {"calibrate": True}):
        with pytest.raises(ValueError, match=r": must be one of .*False"):
            Settings(**wrong)  # type: ignore[arg-type]


def test_refuses_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trace=.*damaged.npz: damaged or not a trace"):
        read_task([f"trace={damaged(tmp_path)}"])
    for changes, message in (
        ({"flops": None}, r"missing keys \['flops'\]"),
        ({"speed": 1}, r"unknown keys \['speed'\]"),
        ({"half_rows": -1}, "half_rows=-1, must be an integer >= 0"),
        ({"hidden_permille": 1001}, "hidden_permille=1001, must be <= 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            read_task([f"cluster={profile(tmp_path, **changes)}"])
    own = tmp_path / "own.yaml"
    own.write_text("name: mine\n")
    with pytest.raises(ValueError, match=r"cluster .*own.yaml: missing keys \['across_work_ps', 'barrier_ns', "):
        read_task([f"cluster={own}"])
    (tmp_path / "config.json").write_text("{")
    for word in (f"cluster={tmp_path / 'config.json'}", f"model={tmp_path}"):
        with pytest.raises(ValueError, match="not"):
            read_task([word])


def test_a_file_is_refused_before_the_work_and_written_whole(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "must be a file, is a folder"), (tmp_path / "none" / "a.json", "does not exist")):
        with pytest.raises(ValueError, match=f"^--json .*{message}"):
            check_writable("--json", path)
    file = tmp_path / "a.json"
    check_writable("--json", file)
    check_writable("--json", None)
    replace_file(file, "one")
    with pytest.raises(UnicodeEncodeError):
        replace_file(file, "two" * 100_000 + "\ud800")
    assert file.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_command_prints_and_writes_nothing_on_errors(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "hecate.sim", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    file = tmp_path / "out.json"
    small = ("model=bert_moe", "cluster=paper_a", "steps=1", "tokens=512", "--json", str(file))
    failed = run(*small, "policy=none")
    assert (failed.returncode, file.exists()) == (2, False)
    assert failed.stderr.startswith("error: policy='none'")
    done = run(*small)
    assert done.returncode == 0, done.stderr
    assert "BERT-MoE on 32 devices of A (V100, 100 Gbit/s), policy balanced" in done.stdout
    assert json.loads(file.read_text())["step_ns"] > 0
