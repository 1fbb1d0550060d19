"""State dicts of model and optimizer at any ownership mean what they mean for the plain model in one process."""

from __future__ import annotations

import io
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import hecate
from hecate.models.gpt import GPTMoE
from hecate.runtime.experts.module import InPool
from hecate.values.local import local_tensor
from tests.checkpoint.plain import TOLERANCE, Plain, Way, assert_same
from tests.checkpoint.runs import TINY, Run, make_optimizer, plain_model
from tests.workers import Groups

UP = "blocks.1.moe.experts.up"
WAYS = {
    "2": (2, Way()),
    "2-uneven": (2, Way(experts=5)),
    "2-layer": (2, Way(pools="layer", dense="replicate")),
    "2-sgd-none": (2, Way(experts=7, dense="none", optimizer="SGD")),
    "2-replicas": (2, Way(mesh=(2, 1))),
    "3": (3, Way(experts=4, dense="replicate")),
    "3-layer-uneven": (3, Way(experts=5, pools="layer")),
    "3-factors": (3, Way(optimizer="Adafactor")),
    "4-mesh": (4, Way(experts=5, mesh=(2, 2))),
}


def whole(entry: Tensor) -> Tensor:
    return entry.full_tensor() if isinstance(entry, DTensor) else entry


def rolled_back(way: Way) -> None:
    """Train, remember, train on, go back, train on: as the plain model does, with experts elsewhere by then."""
    run, plain = way.run(), Plain(way)
    run.train(0, 2)
    plain.train(0, 2)
    kept = deepcopy(run.model.state_dict()), deepcopy(run.optimizer.state_dict())
    expected, owners = plain.snapshot(), run.owners()
    run.train(2, 5)
    plain.train(2, 5)
    assert run.engine.pools[0].num_devices == 1 or run.owners() != owners, "a run without moved experts tests less"
    assert_same(run, plain)
    for _ in range(2):
        assert str(run.model.load_state_dict(kept[0])) == "<All keys matched successfully>"
        run.optimizer.load_state_dict(deepcopy(kept[1]))  # optimizers go on with the tensors that they load
        plain.restore(expected)
        assert_same(run, plain)
        run.train(5, 7)
        plain.train(5, 7)
        assert_same(run, plain)


@pytest.mark.parametrize("name", WAYS)
def test_rollback(groups: Groups, name: str) -> None:
    world, way = WAYS[name]
    groups(world).run(rolled_back, way)


def test_rollback_on_one_device() -> None:
    rolled_back(Way())


def averaged(way: Way) -> None:
    """An average over state dicts of different ownerships, loaded into the model."""
    run, plain = way.run(), Plain(way)
    average, expected = deepcopy(run.model.state_dict()), plain.snapshot()[0]
    seen = set()
    for number in range(5):
        run.train(number, number + 1)
        plain.train(number, number + 1)
        seen.add(str(run.owners()))
        for one, state in ((average, run.model.state_dict()), (expected, plain.model.state_dict())):
            for key, value in state.items():
                one[key].lerp_(value, 0.3)
    assert len(seen) > 1, "a run without moved experts tests less"
    run.model.load_state_dict(average)
    plain.model.load_state_dict(expected)
    assert_same(run, plain)


@pytest.mark.parametrize("way", [Way(), Way(experts=5, dense="replicate")])
def test_average_of_state_dicts(groups: Groups, way: Way) -> None:
    groups(2).run(averaged, way)


def saved_by_rank(folder: str, way: Way) -> None:
    """`torch.save` on each rank, into a new engine whose experts are elsewhere and whose optimizer is fresh."""
    run, plain = way.run(), Plain(way)
    run.train(0, 3)
    plain.train(0, 3)
    file = Path(folder) / f"rank{dist.get_rank()}.pt"
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    again = way.run(seed=9)
    again.train(20, 22)
    assert again.owners() != run.owners()
    again.optimizer = make_optimizer(way.optimizer, again.model)
    loaded = torch.load(file, weights_only=False)
    again.model.load_state_dict(loaded["model"])
    again.optimizer.load_state_dict(loaded["optimizer"])
    again.train(3, 6)
    plain.train(3, 6)
    assert_same(again, plain)


@pytest.mark.parametrize("way", [Way(), Way(experts=5)])
def test_files_of_each_rank(groups: Groups, tmp_path: Path, way: Way) -> None:
    groups(2).run(saved_by_rank, str(tmp_path), way)


def of_the_model(way: Way) -> None:
    """Keys, shapes, order and values are the plain model's, also for a part of it and a module around it."""
    run, plain = way.run(), Plain(way)
    run.train(0, 3)
    plain.train(0, 3)
    around = nn.ModuleDict({"inner": run.model})
    expected = plain.model.state_dict()
    for module, prefix, present in (
        (run.model, "", expected),
        (around, "inner.", {f"inner.{key}": value for key, value in expected.items()}),
        (run.model.blocks[1], "", plain.model.blocks[1].state_dict()),
    ):
        state = module.state_dict()
        assert list(state) == list(present), prefix
        for key, value in present.items():
            assert state[key].shape == value.shape
            torch.testing.assert_close(whole(state[key]), value, **TOLERANCE)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    around.load_state_dict(around.state_dict() | {f"inner.{k}": v for k, v in around["inner"].state_dict().items()})
    assert not run.engine.full_state_dict()[UP].any()


@pytest.mark.parametrize("name", ["2", "3", "2-layer"])
def test_keys_and_shapes(groups: Groups, name: str) -> None:
    world, way = WAYS[name]
    groups(world).run(of_the_model, way)


def a_part_loaded() -> None:
    """`load_state_dict` of one block, and of a module around the model."""
    run, other = Way().run(), Way().run(seed=5)
    run.train(0, 3)
    other.train(3, 5)
    assert run.owners() != other.owners()
    run.model.blocks[1].load_state_dict(deepcopy(other.model.blocks[1].state_dict()))
    state, expected = run.engine.full_state_dict(), other.engine.full_state_dict()
    assert all(torch.equal(state[key], expected[key]) == ("blocks.1." in key) for key in state if key.endswith("up"))
    around, target = nn.ModuleDict({"x": other.model}), nn.ModuleDict({"x": run.model})
    target.load_state_dict(around.state_dict())
    state = run.engine.full_state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_parts_and_modules_around(groups: Groups) -> None:
    groups(2).run(a_part_loaded)


def of_whole_tensors(way: Way) -> None:
    """Experts also come from plain tensors of all of them, as `full_state_dict` has them."""
    run = way.run()
    run.train(0, 3)
    state = run.engine.full_state_dict()
    changed = run.model.state_dict() | {key: 2 * value for key, value in state.items() if ".experts." in key}
    run.model.load_state_dict(changed)
    for key, value in run.engine.full_state_dict().items():
        assert torch.equal(value, 2 * state[key] if ".experts." in key else state[key]), key


def test_whole_tensors_load(groups: Groups) -> None:
    groups(2).run(of_whole_tensors, Way(experts=5))
    of_whole_tensors(Way())


# Memory and graphs.


def shared_memory() -> None:
    """Before anything has moved, entries are the pool's memory, and nothing is sent for them."""
    run = Way().run()
    entry = run.model.state_dict()[UP]
    assert local_tensor(entry).untyped_storage().nbytes() == local_tensor(entry).nbytes
    with torch.no_grad():
        run.model.get_parameter("hecate_pool_0_up").mul_(3)
    assert torch.equal(entry.full_tensor(), run.engine.full_state_dict()[UP])
    if dist.get_rank() == 0:
        assert list(run.model.state_dict()) == list(plain_model().state_dict())  # others do not take part


def test_default_owners_share_memory(groups: Groups) -> None:
    groups(2).run(shared_memory)


def with_vars(way: Way, grad: bool) -> None:
    """`keep_vars=True`: flags as the plain model's; what is computed of entries reaches the pool."""
    run, plain = way.run(), Plain(way)
    run.train(0, 2)
    plain.train(0, 2)
    run.model.get_parameter("hecate_pool_0_down").requires_grad_(False)
    for block in plain.model.blocks:
        block.moe.experts.down.requires_grad_(False)
    with torch.set_grad_enabled(grad):
        state, expected = run.model.state_dict(keep_vars=True), plain.model.state_dict(keep_vars=True)
    assert {key: value.requires_grad for key, value in state.items()} == {
        key: value.requires_grad for key, value in expected.items()
    }
    whole(state[UP].square().sum()).backward()
    expected[UP].square().sum().backward()
    gradient = local_tensor(run.model.get_parameter("hecate_pool_0_up").grad)
    wanted = plain.model.get_parameter(UP).grad
    pool = run.engine.pools[0]
    torch.testing.assert_close(gradient[pool.rows(1)], wanted[torch.from_numpy(pool.owned(1))], **TOLERANCE)
    assert not gradient[pool.rows(0)].any()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", [Way(), Way(experts=5)])
def test_keep_vars(groups: Groups, way: Way, grad: bool) -> None:
    groups(2).run(with_vars, way, grad)


def test_keep_vars_on_one_device() -> None:
    with_vars(Way(), grad=True)


def test_attribute_says_where_the_weight_is() -> None:
    model = hecate.fully_shard(plain_model()).model
    experts = model.get_submodule("blocks.1.moe.experts")
    assert experts.up == InPool(UP, (8, 32, 16), torch.float64)
    assert not list(experts.named_parameters(recurse=False))
    with pytest.raises(AttributeError, match="nothing"):
        _ = experts.nothing
    with pytest.raises(KeyError, match="already exists"):
        experts.up = nn.Parameter(torch.zeros(1))


# What does not fit.


def error_of(run: Run, state: dict[str, Tensor], **options: bool) -> str:
    with pytest.raises(RuntimeError) as caught:
        run.model.load_state_dict(state, **options)
    return str(caught.value)


def misfits() -> None:
    run = Way().run()
    run.train(0, 3)
    state = deepcopy(run.model.state_dict())
    before = run.engine.full_state_dict()[UP]
    without = {key: value for key, value in state.items() if key != UP}
    assert f'Missing key(s) in state_dict: "{UP}".' in error_of(run, without)
    assert run.model.load_state_dict(without, strict=False).missing_keys == [UP]
    pool = run.model.get_parameter("hecate_pool_0_up").detach()
    assert 'Unexpected key(s) in state_dict: "hecate_pool_0_up".' in error_of(run, state | {"hecate_pool_0_up": pool})
    assert f'Unexpected key(s) in state_dict: "{UP}s".' in error_of(run, state | {f"{UP}s": state[UP]})
    message = error_of(run, state | {UP: torch.zeros(7, 32, 16)})
    assert f"{UP} has shape (7, 32, 16); must be (8, 32, 16) on rank 0" in message
    assert f"{UP} is a list; must be a tensor" in error_of(run, state | {UP: [1.0]})
    assert "meta device and has no values" in error_of(run, state | {UP: torch.zeros(8, 32, 16, device="meta")})
    halves = {UP: torch.zeros(8, 32, 16)}
    assert f"{UP} has dtype torch.float32; with assign=True" in error_of(run, state | halves, assign=True)
    own = {UP: state[UP]} if dist.get_rank() == 0 else {UP: torch.zeros(3)}
    assert f"{UP} has shape (3,); must be (8, 32, 16) on rank 1; it was loaded on no rank" in error_of(run, state | own)
    own = {UP: state[UP]} if dist.get_rank() == 0 else {UP: torch.zeros(8, 32, 16)}
    message = error_of(run, state | own)
    assert f"{UP} is a DTensor on rank 0, a plain tensor on rank 1; must be alike on all" in message
    here = state if dist.get_rank() == 1 else without
    message = error_of(run, here)
    assert f"{UP} is missing on rank 0" in message or f'Missing key(s) in state_dict: "{UP}".' in message
    assert torch.equal(run.engine.full_state_dict()[UP], before)
    run.model.load_state_dict(state, assign=True)
    assert torch.equal(run.engine.full_state_dict()[UP], before)
    run.train(3, 4)


def test_what_does_not_fit_is_named(groups: Groups) -> None:
    groups(2).run(misfits)


def test_values_come_with_a_state_dict() -> None:
    with torch.device("meta"):
        model = GPTMoE(TINY).double()
    engine = hecate.fully_shard(model)
    state = plain_model().state_dict()
    state.pop("numbers")
    model.load_state_dict({k: v for k, v in state.items() if k != "head.weight"}, strict=False)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"head\.weight were built on the meta device and have no values yet"):
        model(tokens)
    model.load_state_dict(state)
    model(tokens)
    assert all(torch.equal(value, state[key]) for key, value in engine.full_state_dict().items())


def test_a_file_has_each_expert_once() -> None:
    """Entries are views of one pool, but not of all of it to `torch.save`."""
    model = hecate.fully_shard(plain_model()).model
    file = io.BytesIO()
    torch.save({UP: model.state_dict()[UP]}, file)
    assert file.getbuffer().nbytes < 1.5 * 8 * model.state_dict()[UP].numel()
