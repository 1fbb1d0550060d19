"""Wrappers around blocks and experts, put on before or after sharding: the checkpoint has the model's own names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import hecate
from tests.checkpoint.runs import BALANCED, batch, make_optimizer, plain_model
from tests.checkpoint.wrappers import wrap
from tests.workers import Groups

WRAPPED = ("checkpoint", "compile", "compile experts", "both")


def step(engine: hecate.FSSDP, number: int) -> None:
    tokens = batch(number)[dist.get_rank() :: dist.get_world_size()]
    engine.model(tokens[:, :-1], tokens[:, 1:]).loss.backward()


def checked(folder: str, what: str, before: bool) -> dict[str, Tensor]:
    """Train three steps under wrappers; whatever goes by name agrees with a model without them."""
    model, plain = plain_model(), plain_model()
    if before:
        wrap(model, what)
    engine = hecate.fully_shard(model, None, BALANCED)
    if not before:
        wrap(model, what)
    optimizer = make_optimizer("AdamW", model)
    for number in range(3):
        step(engine, number)
        optimizer.step()
        optimizer.zero_grad()
    state = engine.full_state_dict()
    assert list(state) == list(plain.state_dict())
    engine.save(f"{folder}/saved", optimizer)
    engine.save_pretrained(f"{folder}/pretrained")
    resumed = hecate.fully_shard(plain, None, BALANCED)
    resumed.load(f"{folder}/saved", make_optimizer("AdamW", plain))
    for name, value in resumed.full_state_dict().items():
        assert torch.equal(value, state[name]), name
    files = Path(folder, "pretrained").glob("*.safetensors")
    written = {name: value for file in files for name, value in load_file(file).items()}
    assert written.keys() == state.keys()
    for name, value in written.items():
        assert torch.equal(value, state[name]), name
    engine.load_pretrained(f"{folder}/pretrained")
    engine.init_weights(5)
    resumed.init_weights(5)
    initial = engine.full_state_dict()
    for name, value in resumed.full_state_dict().items():
        assert torch.equal(value, initial[name]), name
    model.get_submodule("head").weight.data.fill_(float("nan"))
    assert engine.non_finite() == ["head.weight"]
    return state


def trained_without_wrappers() -> dict[str, Tensor]:
    engine = hecate.fully_shard(plain_model(), None, BALANCED)
    optimizer = make_optimizer("AdamW", engine.model)
    for number in range(3):
        step(engine, number)
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("what", WRAPPED)
def test_names_are_the_model_s_own(groups: Groups, tmp_path: Path, what: str, before: bool) -> None:
    expected = groups(2).run(trained_without_wrappers)[0]
    for state in groups(2).run(checked, str(tmp_path), what, before):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)


def test_a_wrapped_root_is_no_other_model() -> None:
    plain = plain_model()
    engine = hecate.fully_shard(torch.compile(plain_model(), backend="eager"))
    for name, value in engine.full_state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


class Counting(nn.Module):
    """Keeps state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_extra_state_is_refused_by_name(tmp_path: Path) -> None:
    model = plain_model()
    model.counting = Counting()
    engine = hecate.fully_shard(model)
    for use in (engine.full_state_dict, lambda: engine.save(tmp_path / "saved")):
        with pytest.raises(ValueError, match=r"counting\._extra_state of the model's state dict are no parameters"):
            use()
    assert not (tmp_path / "saved").exists()
