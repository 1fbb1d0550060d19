"""Planning in threads changes when a plan is made, not what it is."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from hecate.collectives.moves import moves_between
from hecate.collectives.route import Links, gather_route, reduce_route
from hecate.collectives.routed import Routed
from hecate.placement import Placement, Topology
from hecate.runtime.experts.layer import LayerExperts
from hecate.runtime.plans import ahead as module
from hecate.runtime.plans.ahead import NICE, PlanAhead, PlanningThreads, number_of_threads
from hecate.runtime.plans.layer import Outlook


@dataclass
class _Outlook:
    value: int
    planned: list[int] = field(default_factory=list)

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.value,)

    def placement(self) -> Placement:
        self.planned.append(self.value)
        return Placement(np.ones((self.value, 1)))

    def equals(self, other: _Outlook) -> bool:
        return self.value == other.value


@dataclass
class _Layer:
    value: int
    planned: list[int] = field(default_factory=list)
    told: tuple[int, ...] = ()

    def outlook(self) -> _Outlook:
        return _Outlook(self.value, self.planned)

    def planned_from(self, steps: tuple[int, ...]) -> None:
        self.told = steps


def _experts(ahead: PlanAhead) -> list[int]:
    return [placement.num_experts for placement in ahead.placements()]


def test_uses_what_was_begun_where_nothing_changed() -> None:
    layers = [_Layer(2), _Layer(3)]
    ahead = PlanAhead(layers, PlanningThreads(2))  # type: ignore[arg-type]
    ahead.start()
    layers[1].value = 5  # as if one more micro-batch had come
    assert _experts(ahead) == [2, 5]
    assert layers[0].planned == [2]
    assert 5 in layers[1].planned
    assert [layer.told for layer in layers] == [(2,), (5,)]
    assert ahead.seconds > 0


def test_plans_at_once_where_nothing_was_begun() -> None:
    layers = [_Layer(2), _Layer(3)]
    ahead = PlanAhead(layers, PlanningThreads(1))  # type: ignore[arg-type]
    assert _experts(ahead) == [2, 3]
    ahead.start()
    ahead.start()
    assert _experts(ahead) == [2, 3]


@pytest.mark.parametrize(("cores", "processes", "threads"), [(64, 8, 4), (16, 8, 2), (2, 8, 1), (None, 1, 1)])
def test_auto_is_the_share_of_the_cores(cores: int | None, processes: int, threads: int) -> None:
    with mock.patch.object(module.os, "cpu_count", return_value=cores):
        assert number_of_threads("auto", processes) == threads
        assert number_of_threads(7, processes) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities per thread")
def test_planning_threads_have_low_priority() -> None:
    threads = PlanningThreads(1)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    seen = threads.submit(lambda: os.getpriority(os.PRIO_PROCESS, 0)).result()
    threads.close()
    assert seen == min(19, before + NICE)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


class _Transport(Routed):
    """Finds routes and sends nothing."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.links, self._rank = topology, Links(1, 1, 1, 1, 0, 0), 0

    _start_gather = _start_reduce = _post = None  # type: ignore[assignment]


_Transport.__abstractmethods__ = frozenset()


def _experts_of(transport: _Transport, gradient: int) -> LayerExperts:
    """A layer with experts of 6 weights in bfloat16; gradients of `gradient` of them return in float32."""
    layer = SimpleNamespace(
        comms=SimpleNamespace(gathers=transport, reductions=transport),
        kept=None,
        layout=SimpleNamespace(numel=6),
        dtypes=SimpleNamespace(param=torch.bfloat16, reduce=torch.float32),
        gradient_layout=lambda: SimpleNamespace(numel=gradient),
    )
    layer.make_routes = lambda *args, **kwargs: LayerExperts.make_routes(layer, *args, **kwargs)  # type: ignore[arg-type]
    return layer  # type: ignore[return-value]


def test_who_plans_makes_the_routes_that_launches_look_up() -> None:
    topology, owners = Topology(4, 2), np.array([0, 1, 2, 3])
    transport = _Transport(topology)
    placement = Placement(np.eye(4, dtype=bool) | (np.arange(4) == 0)[:, None])
    policy = SimpleNamespace(materialize=lambda setting, history, owners: placement if len(history) == 2 else None)
    steps = (np.ones((4, 4), dtype=np.int64),) * 2
    own, setting = Placement.from_owners(owners, 4), SimpleNamespace(topology=topology)
    outlook = Outlook(policy, setting, steps, owners, own, _experts_of(transport, 5))  # type: ignore[arg-type]
    gather_route.cache_clear()
    reduce_route.cache_clear()
    assert outlook.placement() is placement
    assert (gather_route.cache_info().misses, reduce_route.cache_info().misses) == (1, 1)
    moves = moves_between(Placement.from_owners(owners, 4), placement)
    assert transport._gather_parts(moves, 6 * 2)
    assert transport._reduce_parts(moves.reversed, 5, torch.float32)
    assert (gather_route.cache_info().misses, reduce_route.cache_info().misses) == (1, 1)


def test_without_copies_or_gradients_there_are_no_such_routes() -> None:
    owners = Placement.from_owners([0, 1], 2)
    experts = _experts_of(_Transport(Topology(2, 2)), 0)
    gather_route.cache_clear()
    reduce_route.cache_clear()
    experts.make_routes(owners, owners)
    assert gather_route.cache_info().misses == 0
    experts.make_routes(owners, Placement(np.ones((2, 2))), gather=False)
    assert (gather_route.cache_info().misses, reduce_route.cache_info().misses) == (0, 0)


def test_an_outlook_changes_with_any_step() -> None:
    own, both = Placement.even(2, 2), Placement(np.ones((2, 2)))

    def outlook(*steps: int, kept: Placement = own) -> Outlook:
        counts = tuple(np.full((2, 2), step) for step in steps)
        return Outlook(None, None, counts, np.array([0, 1]), kept, None)  # type: ignore[arg-type]

    assert outlook(1, 2).equals(outlook(1, 2))
    assert not outlook(1, 2).equals(outlook(1, 2, kept=both))
    assert not outlook(1, 2).equals(outlook(1, 3))
    assert not outlook(1, 2).equals(outlook(2))
    assert not outlook(1).equals(outlook())
