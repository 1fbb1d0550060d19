"""Configuration: every file of conf/ is a valid run, and what is not is refused with the valid choices."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hecate.config import FSSDPConfig
from hecate.models import GPTMoE
from hecate.train.__main__ import check_keys
from hecate.train.loop import learning_rate
from hecate.train.settings import MODELS, OptimizerSettings, Settings, conf_dir
from tests.train.configs import config


def parameters_without_vocabulary(settings: Settings) -> int:
    with torch.device("meta"):
        model = MODELS[settings.kind](settings.model)
    return sum(p.numel() for p in model.blocks.parameters())


@pytest.mark.parametrize("path", sorted(conf_dir().glob("model/*.yaml")), ids=lambda p: p.stem)
def test_every_model_of_conf_is_a_valid_run(path: Path) -> None:
    settings = Settings.from_config(config(f"model={path.stem}"))
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
        ("+model.layers=3", r"model: layers unknown or missing; the keys are aux_scope, aux_weight"),
    ],
)
def test_wrong_values_are_named_with_the_rule(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_config(config(override))


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


def test_keys_that_exist_pass() -> None:
    check_keys(
        ["policy=ep", "data=tokens", "data.path=x.bin", "data.dtype=uint16", "logger=wandb", "logger.mode=online"]
    )


def test_model_has_the_values_of_its_seed() -> None:
    settings = Settings.from_config(config("seed=5", "model.d_model=8", "model.num_layers=1"))
    expected = GPTMoE(settings.model)
    expected.init_weights(seed=5)
    for name, parameter in settings.build_model(torch.device("cpu")).named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    optimizer = OptimizerSettings(2.0, (0.9, 0.95), 0.1, warmup=4, final_lr_share=0.1, max_grad_norm=1.0)
    rates = [learning_rate(step, 104, optimizer) for step in range(1, 105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[53] == pytest.approx(2.0 * 0.55)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[3:]))
    assert learning_rate(1, 10, replace(optimizer, warmup=0)) < 2.0
