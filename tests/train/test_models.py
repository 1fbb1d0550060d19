"""Models of a run that are not Hecate's own: from a folder of transformers, and made by a function of the user."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hecate
from hecate.examples.shared import tiny_model
from hecate.models import GPTMoE, ModelConfig
from hecate.train.loop import Trainer
from hecate.train.models import Losses, trained_model
from hecate.train.optimizer import make_optimizer
from hecate.train.settings import Settings
from hecate.train.work import Work
from tests.faults.jobs import make_trainer, write_text
from tests.train.configs import config
from tests.workers import Groups

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE with weights."""
    path = tmp_path_factory.mktemp("hf")
    tiny_model(path)
    return path


def folder_settings(folder: Path, *overrides: str) -> Settings:
    return Settings.from_config(config("model=hf", f"model.path={folder}", "data.tokenizer=bytes", *overrides))


def own_model(layers: int) -> nn.Module:
    """What `model._target_` names in these tests."""
    return GPTMoE(ModelConfig(d_model=16, num_layers=layers, num_heads=2, max_length=16))


class Regression(nn.Module):
    """Takes batches of the user's own data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """`x` `[B, 4]`, `y` `[B]`."""
        return {"loss": (self.linear(x).squeeze(1) - y).square().mean()}


class Labelled(Regression):
    """A classifier: labels `[B]` and no sequence."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(x, labels.float())


def no_optimizer(parameters: Any, **given: Any) -> dict[str, Any]:
    return {}


def user_model(path: str, *overrides: str) -> Any:
    section = ["~model", f"+model._target_={path}", "sequence_length=16", *overrides]
    return trained_model(Settings.from_config(config(*section)))


def test_a_folder_gives_its_weights_and_its_loss(folder: Path) -> None:
    kind, plain = trained_model(folder_settings(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert kind.token_limit == 256
    model = kind.build(CPU)
    assert all(p.is_meta for p in model.parameters())
    engine = hecate.fully_shard(model)
    kind.fill(engine)
    state = engine.full_state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
    batch = torch.randint(256, (3, 9))
    found = kind.losses(model, batch, 0, CPU)
    expected = plain(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
    torch.testing.assert_close(found, Losses(expected, expected.detach(), 3 * 7))


def test_auxiliary_losses_are_no_cross_entropy(folder: Path) -> None:
    overrides = ("+model.config.output_router_logits=true", "+model.config.router_aux_loss_coef=0.5")
    kind, plain = trained_model(folder_settings(folder, *overrides)), AutoModelForCausalLM.from_pretrained(folder)
    engine = hecate.fully_shard(kind.build(CPU))
    kind.fill(engine)
    batch = torch.randint(256, (3, 9))
    found = kind.losses(engine.model, batch, 0, CPU)
    expected = plain(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
    torch.testing.assert_close(found.lm_loss, expected.detach())
    assert found.loss.item() > expected.item() + 0.4  # an even load has 1


def test_a_folder_may_be_changed_and_drawn_anew(folder: Path) -> None:
    changed = ("+model.config.num_hidden_layers=1", "model.random_weights=true", "model.checkpoint=true", "seed=3")
    kind = trained_model(folder_settings(folder / "config.json", *changed))
    model: Any = kind.build(CPU)
    assert len(model.model.layers) == 1
    assert model.is_gradient_checkpointing
    engine = hecate.fully_shard(model)
    kind.fill(engine)
    expected = hecate.fully_shard(trained_model(folder_settings(folder, *changed)).build(CPU))
    expected.init_weights(3)
    for name, value in expected.full_state_dict().items():
        assert torch.equal(engine.full_state_dict()[name], value), name
    with pytest.raises(ValueError, match="num_layerz"):
        trained_model(folder_settings(folder, "+model.config.num_layerz=1"))


def test_work_of_a_folder(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    work = Work.of(model, 10)
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    assert (work.experts, work.top_k) == ((8, 8), 2)
    assert work.active == work.parameters - experts * 6 // 8
    assert work.flops_per_token == 6 * (work.active - 256 * 64) + 12 * 2 * 64 * 10


@pytest.mark.parametrize("on", ["meta", "cpu"])
def test_a_model_of_the_user_has_the_values_of_the_seed(on: str) -> None:
    def values(seed: int) -> dict[str, Tensor]:
        kind = user_model("tests.train.test_models.own_model", "+model.layers=1", f"seed={seed}")
        with torch.device(on):
            model = kind.build(CPU)
        engine = hecate.fully_shard(model)
        kind.fill(engine)
        return engine.full_state_dict()

    first, again, other = values(1), values(1), values(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert on == "cpu" or any(not torch.equal(value, other[name]) for name, value in first.items())
    path = "tests.train.test_models.Regression"
    drawn, same, else_ = (user_model(path, f"seed={s}").build(CPU).linear.weight for s in (1, 1, 2))
    assert torch.equal(drawn, same)
    assert not torch.equal(drawn, else_)


def test_a_model_of_the_user_is_called_with_its_batches() -> None:
    tokens = user_model("tests.train.test_models.own_model", "+model.layers=1")
    model, batch = tokens.build(CPU), torch.randint(256, (2, 9))
    expected = model(batch[:, :-1], batch[:, 1:])
    torch.testing.assert_close(tokens.losses(model, batch, 0, CPU), Losses(expected.loss, expected.lm_loss, 16))
    kind = user_model("tests.train.test_models.Regression")
    regression, x, y = kind.build(CPU), torch.rand(5, 4), torch.rand(5)
    loss = regression(x, y)["loss"]
    for given in ({"x": x, "y": y}, (x, y), [x, y]):
        torch.testing.assert_close(kind.losses(regression, given, 0, CPU), Losses(loss, loss.detach(), 5))
    labelled = user_model("tests.train.test_models.Labelled")
    assert (
        labelled.losses(labelled.build(CPU), {"x": x, "labels": torch.tensor([0, 1, 1, 0, 1])}, 0, CPU).predicted == 5
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.model", r"model._target_='nowhere.model': ModuleNotFoundError: No module named 'nowhere'"),
        ("tests.train.test_models.own_model", r"TypeError: own_model\(\) missing 1 required .* 'layers' \(debug=true"),
        ("builtins.dict", "model._target_='builtins.dict': returned dict; must be a torch.nn.Module"),
    ],
)
def test_what_is_no_model_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        user_model(path).build(CPU)


def test_an_optimizer_of_the_user() -> None:
    changed = ("~optimizer.betas", "optimizer._target_=torch.optim.SGD", "+optimizer.momentum=0.5", "optimizer.lr=2")
    made = make_optimizer(Settings.from_config(config(*changed)).optimizer, nn.Linear(2, 2))
    assert isinstance(made, torch.optim.SGD)
    group = made.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], len(group["params"])) == (2, 0.5, 0.1, 2)
    wrong = Settings.from_config(config("+optimizer.momentum=0.5")).optimizer
    with pytest.raises(ValueError, match=r"optimizer._target_='torch.optim.AdamW': TypeError: .*momentum"):
        make_optimizer(wrong, nn.Linear(2, 2))
    path = "tests.train.test_models.no_optimizer"
    with pytest.raises(ValueError, match=rf"optimizer._target_='{path}': returned dict; must be a torch optimizer"):
        make_optimizer(Settings.from_config(config(f"optimizer._target_={path}")).optimizer, nn.Linear(2, 2))


def from_folder(root: str, name: str, folder: str, *overrides: str) -> Trainer:
    given = ("model=hf", f"model.path={folder}", "model.max_length=16", "data.tokenizer=bytes", *overrides)
    run = make_trainer(Trainer, root, f"name={name}", *given, sizes=("validation.sequences=5", "optimizer.warmup=2"))
    run.resume()
    return run


def train_from_folder(root: str, folder: str) -> list[float]:
    """Validation losses: of the folder, after three steps, when these are resumed, after six, of what was saved."""
    first = from_folder(root, "hf", folder, "steps=3")
    losses = [first.validate()["validation_loss"]]
    first.train()
    losses.append(first.validate()["validation_loss"])
    second = from_folder(root, "hf", folder, "steps=6", "save_pretrained=true")
    losses.append(second.validate()["validation_loss"])
    second.train()
    losses.append(second.validate()["validation_loss"])
    return [*losses, from_folder(root, "again", f"{root}/hf/pretrained").validate()["validation_loss"]]


def test_a_run_from_a_folder_goes_on_and_is_saved_for_transformers(
    groups: Groups, folder: Path, tmp_path: Path
) -> None:
    write_text(tmp_path)
    losses, other = groups(2).run(train_from_folder, str(tmp_path), str(folder))
    assert losses == other
    before, middle, resumed, after, saved = losses
    assert after < middle < before < math.log(256) + 0.3
    assert resumed == middle
    assert saved == after
    text = " ".join(path.read_text() for path in sorted((tmp_path / "text").iterdir()))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "pretrained")
    tokens = torch.tensor([list(text.encode()[:128])])
    assert plain(input_ids=tokens, labels=tokens).loss.item() < before
