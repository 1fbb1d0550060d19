"""`FSSDPConfig.transport`: over shared memory training has the same bits as over messages; and what is said of it."""

from __future__ import annotations

import logging
import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from hecate.collectives import choice
from hecate.models.gpt import GPTMoE
from hecate.private_torch import symmetric_missing
from tests.bench import mesh_of
from tests.runtime.helpers import settings
from tests.runtime.reference import TINY, full_gradients
from tests.workers import Groups

MIXED = {"master_dtype": torch.float32, "param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
CASES: dict[str, tuple[int, tuple[int, int] | None, dict[str, Any]]] = {
    "2-float64": (2, None, {"master_dtype": torch.float64, "reshard_interval": 1}),
    "2-bfloat16": (2, None, {"master_dtype": torch.bfloat16}),  # sums are staged: they are wider than the gradients
    "4-mixed-remat": (4, None, {**MIXED, "rematerialize": True}),
    "4-mixed": (4, None, {**MIXED, "policy": "hecate"}),
    "4-mesh-2x2-narrow": (4, (2, 2), {**MIXED, "reduce_dtype": torch.bfloat16}),
}


def train(mesh: tuple[int, int] | None, changes: dict[str, Any]) -> tuple[str, int, dict[str, Tensor]]:
    """What carried copies and gradients, how many copies there were, and gradients and parameters of three steps."""
    torch.manual_seed(0)
    model, found, copies = GPTMoE(TINY), {}, 0
    engine = hecate.fully_shard(model, mesh_of(mesh), settings(**changes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        for micro_batch in range(2):
            torch.manual_seed(100 * step + 10 * micro_batch + dist.get_rank())
            tokens = torch.randint(TINY.vocab_size, (2, 9))
            model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        found |= {f"gradient {step} {name}": grad.clone() for name, grad in full_gradients(engine).items()}
        optimizer.step()
        optimizer.zero_grad()
        copies += sum(layer["copies"] for layer in engine.stats()["layers"])
    found |= engine.full_state_dict()
    used = engine.stats()["transport"]
    engine.close()
    return used, copies, found


def compare(mesh: tuple[int, int] | None, changes: dict[str, Any]) -> None:
    used, copies, expected = train(mesh, {**changes, "transport": "messages"})
    assert used == "gloo"
    assert copies > 0
    used, also, got = train(mesh, {**changes, "transport": "symmetric"})
    assert (used, also) == ("symmetric", copies)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("name", CASES)
def test_training_has_the_same_bits(groups: Groups, name: str) -> None:
    world, *given = CASES[name]
    groups(world).run(compare, *given)


def refuse_by_name() -> None:
    before = GPTMoE(TINY)
    names = [name for name, _ in before.named_parameters()]
    message = r'transport="symmetric": rank 0: the ranks that share experts are on 2 nodes'
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="1"), pytest.raises(RuntimeError, match=message):
        hecate.fully_shard(before, None, settings(transport="symmetric"))
    assert [name for name, _ in before.named_parameters()] == names
    assert not any(isinstance(p, torch.distributed.tensor.DTensor) for p in before.parameters())


def one_rank_lacks_it(lacking: str) -> None:
    """One rank fails, before memory is shared or while it is: all ranks send messages, and rank 0 says why."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hecate.runtime.comms.wanted", lambda *_: True)  # as on CUDA
        if dist.get_rank() == 1:
            patch.setattr(choice, lacking, _fails if lacking == "Symmetric" else lambda *_: "no peer access")
        elif lacking == "Symmetric":
            patch.setattr(choice, lacking, lambda *_: mock.Mock())
        logged: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("hecate").addHandler(handler)
        engine = hecate.fully_shard(GPTMoE(TINY), None, settings())
        logging.getLogger("hecate").removeHandler(handler)
    assert engine.stats()["transport"] == "gloo"
    engine.close()
    line = "copies and gradients of experts are sent as messages, not read from shared memory: rank 1: no peer access"
    assert logged == ([line] if dist.get_rank() == 0 else [])


def _fails(*_: object) -> None:
    raise RuntimeError("no peer access\nand more lines")


def test_by_name_it_is_there_or_nothing_is_changed(groups: Groups) -> None:
    groups(2).run(refuse_by_name)
    with pytest.raises(ValueError, match=r"transport='nvlink': must be one of 'auto', 'symmetric', 'messages'"):
        settings(transport="nvlink")


@pytest.mark.parametrize("lacking", ["_peers", "Symmetric"])
def test_auto_says_in_one_line_why(groups: Groups, lacking: str) -> None:
    groups(2).run(one_rank_lacks_it, lacking)


def test_on_one_device_there_is_none() -> None:
    engine = hecate.fully_shard(GPTMoE(TINY), None, settings(transport="symmetric"))
    assert engine.stats()["transport"] is None
    engine.close()


def test_a_gradient_dtype_without_a_kernel_is_named() -> None:
    reason = choice._sums([torch.float32, torch.int16])
    assert reason == "no kernel adds gradients in torch.int16 to sums in torch.int16"


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert symmetric_missing() is None
    monkeypatch.delattr("torch.distributed._symmetric_memory.rendezvous")
    assert symmetric_missing() == f"torch {torch.__version__} has no symmetric memory: rendezvous missing"
