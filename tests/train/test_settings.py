"""Configuration: every file of conf/ is a valid run, and what is not is refused with the valid choices."""

from __future__ import annotations

import runpy
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hecate.config import FSSDPConfig
from hecate.models import GPTMoE
from hecate.train.__main__ import check_keys, options_first
from hecate.train.models import trained_model
from hecate.train.optimizer import learning_rate
from hecate.train.settings import MODELS, DataSettings, OptimizerSettings, Settings, conf_dir
from hecate.train.target import Target
from tests import forked
from tests.train.configs import config


def parameters_without_vocabulary(settings: Settings) -> int:
    with torch.device("meta"):
        model = MODELS[settings.kind](settings.model)
    return sum(p.numel() for p in model.blocks.parameters())


@pytest.mark.parametrize("path", sorted(conf_dir().glob("model/*.yaml")), ids=lambda p: p.stem)
def test_every_model_of_conf_is_a_valid_run(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    folder = [f"model.path={tmp_path}"] if path.stem == "hf" else []
    settings = Settings.from_config(config(f"model={path.stem}", *folder))
    assert settings.sequence_length == settings.model.max_length


@pytest.mark.parametrize(
    ("model", "billions"), [("gpt_moe_s", 1.84), ("gpt_moe_l", 7.36), ("bert_moe", 3.27), ("bert_moe_deep", 6.54)]
)
def test_papers_models_have_the_papers_size(model: str, billions: float) -> None:
    size = parameters_without_vocabulary(Settings.from_config(config(f"model={model}")))
    assert size / 1e9 == pytest.approx(billions, abs=0.006)


def test_fssdp_section_is_fssdpconfig_with_its_defaults_but_for_resharding() -> None:
    section = config()["fssdp"]
    assert set(section) == {f.name for f in fields(FSSDPConfig)}
    assert Settings.from_config(config()).fssdp == FSSDPConfig(reshard_interval=100)


def test_devices_are_those_that_a_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Settings.from_config(config()).devices == 3
    monkeypatch.delenv("WORLD_SIZE")
    assert Settings.from_config(config()).devices == 2


@pytest.mark.parametrize(
    ("files", "overrides", "found"),
    [
        ((), (), "bytes"),
        (("tokenizer.json",), (), "FOLDER"),
        (("tokenizer_config.json", "model.safetensors"), (), "FOLDER"),
        (("model.safetensors",), ("model.random_weights=true",), "bytes"),
        (("model.safetensors",), ("data.tokenizer=bytes",), "bytes"),
        (("tokenizer.json",), ("data.tokenizer=other",), "other"),
    ],
)
def test_text_of_a_folders_model_is_read_by_its_tokenizer(
    files: tuple[str, ...], overrides: tuple[str, ...], found: str, tmp_path: Path
) -> None:
    for name in ("config.json", *files):
        (tmp_path / name).touch()
    data = Settings.from_config(config("model=hf", f"model.path={tmp_path}", *overrides)).data
    assert isinstance(data, DataSettings)
    assert data.tokenizer == found.replace("FOLDER", str(tmp_path))


def test_weights_without_a_tokenizer_read_no_bytes_by_accident(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"data.tokenizer=null: .* has weights but no tokenizer; set data.tokenizer"):
        Settings.from_config(config("model=hf", f"model.path={tmp_path}"))
    with pytest.raises(ValueError, match=r"model.path='nowhere': must be a folder with a config.json"):
        Settings.from_config(config("model=hf", "model.path=nowhere"))


def test_policy_seed_and_dtypes_reach_fssdp() -> None:
    settings = Settings.from_config(config("policy=ep", "seed=3", "fssdp.param_dtype=bfloat16"))
    assert (settings.fssdp.policy, settings.fssdp.seed, settings.fssdp.param_dtype) == ("ep", 3, torch.bfloat16)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy=best", r"policy='best': must be one of 'balanced', 'hecate', 'ep'"),
        ("model.top_k=9", r"model.top_k=9: must be <= model.num_experts=8"),
        ("sequence_length=512", r"sequence_length=512: must be <= model.max_length=256"),
        ("name=a/b", r"name='a/b': must be the plain name of a folder"),
        ("name=..", r"name='..': must be"),
        ("name=17", r"name=17: must be the plain name of a folder, and no number"),
        ("devices=0", r"devices=0: must be an integer >= 1"),
        ("fssdp.param_dtype=float16", r"fssdp.param_dtype='float16': must be null or one of float64"),
        ("model.kind=rnn", r"model.kind='rnn': must be one of gpt, bert"),
        ("save_keep=0", r"save_keep=0: must be an integer >= 1"),
        ("max_skipped=-1", r"max_skipped=-1: must be >= 0"),
        ("on_non_finite=ignore", r"on_non_finite='ignore': must be one of skip, stop"),
        ("requeue_exit_code=1", r"requeue_exit_code=1: must be in \[3, 127\]"),
        ("device=tpu", r"device='tpu': must be one of auto, cpu, cuda"),
        ("optimizer.lr=abc", r"optimizer.lr='abc': must be a number"),
        ("optimizer.betas=[0.9,x]", r"optimizer.betas=\(0.9, 'x'\): must be a number each"),
        ("optimizer.betas=0.9", r"optimizer.betas=0.9: must be a list of 2"),
        ("optimizer.betas=[0.9]", r"optimizer.betas=\(0.9,\): must be a list of 2"),
        ("model.d_model=1.5", r"model.d_model=1.5: must be an integer"),
        ("steps=many", r"steps='many': must be an integer"),
        ("save_async=1", r"save_async=1: must be true or false"),
        ("data.path=3", r"data.path=3: must be a text or null"),
        ("dense=none", r"dense='none': leaves the rest of the model to the caller"),
        ("~optimizer._target_", r"optimizer: _target_ missing"),
        ("+foo=1", r"key 'foo' does not exist; there are the keys accumulate"),
        ("timeout_seconds=0", r"timeout_seconds=0: must be > 0"),
        ("peak_tflops=-3", r"peak_tflops=-3: must be null or > 0"),
        ("validation.sequences=0", r"validation.sequences=0: must be >= 1"),
        ("validation.interval=-1", r"validation.interval=-1: must be >= 0"),
        ("optimizer.warmup=-1", r"optimizer.warmup=-1: must be >= 0"),
        ("optimizer.max_grad_norm=0", r"optimizer.max_grad_norm=0: must be > 0"),
        ("~steps", r"key 'steps' is missing"),
        ("~logger", r"key 'logger' is missing"),
        ("fssdp=balanced", r"fssdp='balanced': must be a section, whose keys are set by fssdp.KEY=VALUE"),
        ("logger.kind=paper", r"logger.kind='paper': must be one of none, tensorboard, wandb"),
        ("deepspeed=no.json", r"deepspeed='no.json': no such file"),
        ("+model.layers=3", r"model: layers unknown or missing; the keys are aux_scope, aux_weight"),
    ],
)
def test_wrong_values_are_named_with_the_rule(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_config(config(override))


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hecate.train.settings.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"logger.kind='wandb': wandb is not installed; install hecate-moe\[train\]"):
        Settings.from_config(config("logger=wandb"))
    Settings.from_config(config())


def test_without_the_extra_the_command_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    monkeypatch.delitem(sys.modules, "hecate.train.__main__")
    with pytest.raises(SystemExit, match=r"error: the trainer needs hydra, .*: pip install 'hecate-moe\[train\]'"):
        runpy.run_module("hecate.train.__main__", run_name="probe")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("polcy=ep", "key 'polcy' does not exist; there are the keys accumulate, batch_size"),
        ("fssdp.polcy=ep", "key 'fssdp.polcy' does not exist; fssdp has the keys calibrate, cost"),
        ("data.path.deep=3", "key 'data.path.deep' does not exist; data.path has the keys none"),
        ("model=gpt5", "gpt_moe_tiny"),
    ],
)
def test_keys_that_do_not_exist_are_refused_with_those_that_do(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_keys([override])


def test_a_folder_of_the_user_adds_options(tmp_path: Path) -> None:
    for group, text in (("model", "defaults: [gpt_moe_tiny]\nd_model: 64\n"), ("experiment", "steps: 3\n")):
        (tmp_path / group).mkdir()
        head = "# @package _global_\n" if group == "experiment" else ""
        (tmp_path / group / "mine.yaml").write_text(head + text)
    given = [f"--config-dir={tmp_path}", "model=mine", "+experiment=mine", "model.top_k=1"]
    check_keys(given)
    check_keys(["--config-dir", *given[0].split("=")[1:], *given[1:]])
    with pytest.raises(ValueError, match=r"key 'model\.topk' does not exist"):
        check_keys([*given, "model.topk=1"])
    with pytest.raises(ValueError, match="mine"):
        check_keys(given[1:])
    with pytest.raises(ValueError, match=r"--config-dir nowhere: no such folder"):
        check_keys(["--config-dir=nowhere"])


def test_jobs_of_a_multirun_have_folders_of_their_own(tmp_path: Path) -> None:
    code = "import hecate.train.__main__ as m; m.launch = lambda config, run: print('runs', config['name']); m.main()"
    start = ["-c", code, "policy=ep,balanced", "--multirun", "seed=1"]
    long = "data.path=" + "a" * 200
    done = forked.run(*start, long, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {line.removeprefix("runs ") for line in done.stdout.splitlines()}
    assert len(names) == 2
    assert all(name.startswith("policy=") and len(name) < 200 for name in names)
    for given, name in ((), ""), (("name=grid",), "grid,"):
        done = forked.run(*start, *given, cwd=tmp_path)
        assert done.stdout.split("\n")[:2] == [f"runs {name}policy={policy},seed=1" for policy in ("ep", "balanced")]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["runs", "runs/multirun.yaml"]


def test_options_of_hydra_may_stand_between_overrides() -> None:
    words = ["devices=2", "--config-dir", "my=conf", "+experiment=mine", "-m", "~trace", "--cfg", "job", "name=x"]
    overrides = ["devices=2", "+experiment=mine", "~trace", "name=x"]
    assert options_first(words) == ["--config-dir", "my=conf", "-m", "--cfg", "job", *overrides]


def test_keys_that_exist_pass() -> None:
    check_keys(
        ["policy=ep", "data=tokens", "data.path=x.bin", "data.dtype=uint16", "logger=wandb", "logger.mode=online"]
    )


def test_model_has_the_values_of_its_seed() -> None:
    settings = Settings.from_config(config("seed=5", "model.d_model=8", "model.num_layers=1"))
    expected = GPTMoE(settings.model)
    expected.init_weights(seed=5)
    for name, parameter in trained_model(settings).build(torch.device("cpu")).named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    optimizer = OptimizerSettings(Target("optimizer", "torch.optim.AdamW"), 2.0, warmup=4, final_lr_share=0.1)
    rates = [learning_rate(step, 104, optimizer) for step in range(1, 105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[53] == pytest.approx(2.0 * 0.55)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[3:]))
    assert learning_rate(1, 10, replace(optimizer, warmup=0)) < 2.0
