"""`Placement` and `Topology`: operations on sets of (expert, device) pairs, and invalid arguments."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from hecate import Placement, Topology
from hecate.cost import CostModel
from hecate.placement import initial_owners


def test_set_algebra() -> None:
    a = Placement.from_owners([0, 1, 1], 2)
    b = Placement([[1, 1], [0, 1], [0, 0]])
    assert (a | b).matrix.tolist() == [[True, True], [False, True], [False, True]]
    assert (b - a).matrix.tolist() == [[False, True], [False, False], [False, False]]
    assert a <= (a | b)
    assert not b <= a
    assert a == Placement.from_owners(np.array([0, 1, 1]), 2)
    assert a != b
    assert len({a, Placement.from_owners([0, 1, 1], 2), b}) == 2
    assert pickle.loads(pickle.dumps(a)) == a


def test_is_immutable() -> None:
    matrix = np.ones((2, 2), dtype=bool)
    placement = Placement(matrix)
    matrix[0, 0] = False
    assert placement.matrix[0, 0]
    with pytest.raises(ValueError, match="read-only"):
        placement.matrix[0, 0] = False
    with pytest.raises(AttributeError, match="immutable"):
        placement.matrix = matrix  # type: ignore[misc]


def test_owners() -> None:
    assert Placement.from_owners([1, 0, 1], 2).owners.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="expert 1 is on 2 devices, must be on exactly 1"):
        _ = Placement([[1, 0], [1, 1]]).owners
    with pytest.raises(ValueError, match=r"expert 1 has owner 2, must be a device in \[0, 2\)"):
        Placement.from_owners([0, 2], 2)


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 2\) and \(3, 2\) differ"):
        _ = Placement.even(2, 2) | Placement.even(3, 2)
    with pytest.raises(ValueError, match="shape"):
        Placement([True, False])


@pytest.mark.parametrize(("experts", "devices"), [(8, 4), (7, 3), (3, 5), (1, 1)])
def test_even_sharding(experts: int, devices: int) -> None:
    sizes = Placement.even(experts, devices).matrix.sum(axis=0)
    assert sizes.sum() == experts
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("experts", "devices"), [(7, 3), (3, 5), (8, 4), (5, 4)])
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 12])
def test_initial_owners_are_even_over_all_layers(experts: int, devices: int, layers: int) -> None:
    owned = sum(np.bincount(initial_owners(experts, devices, i * experts), minlength=devices) for i in range(layers))
    assert owned.max() - owned.min() <= 1
    assert owned.max() == -(-layers * experts // devices)


def test_topology() -> None:
    topology = Topology(6, 2)
    assert topology.num_nodes == 3
    assert [topology.node_of(d) for d in range(6)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="num_devices=6 must be a multiple of devices_per_node=4"):
        Topology(6, 4)
    with pytest.raises(ValueError, match="must be >= 1"):
        Topology(0, 1)


def test_topology_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Topology.detect(4) == Topology(4, 2)
    assert Topology.detect(3) == Topology(3, 3)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert Topology.detect(4) == Topology(4, 4)


def test_cost_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = CostModel(flops=10**12)
    model.save(tmp_path / "profile.json")
    assert CostModel.load(tmp_path / "profile.json") == model
    assert model.compute_ns(10**12) == 10**9
    assert CostModel(intra_node_bandwidth=10**9, message_ns=5).transfer_ns(1000, crosses_node=False) == 1005
    (tmp_path / "wrong.json").write_text('{"flops": 1}')
    with pytest.raises(ValueError, match="must be exactly"):
        CostModel.load(tmp_path / "wrong.json")
    with pytest.raises(ValueError, match=r"CostModel.flops=1\.5: must be an integer >= 1"):
        CostModel(flops=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden_permille=1001: must be <= 1000"):
        CostModel(hidden_permille=1001)
