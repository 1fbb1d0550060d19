"""Checks routes with a slow simulator in numpy, in which a device can send only what arrived in earlier rounds."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hecate.collectives.route import Hop, Links, Route, gather_route, reduce_route
from hecate.placement import Placement, Topology
from tests.collectives.cases import HOST, MIB, SLOW_BORDER, settings_of


def rounds(route: Route) -> list[list[Hop]]:
    """Hops by round, ascending."""
    found: dict[int, list[Hop]] = defaultdict(list)
    for number, *values in route.hops.tolist():
        *integers, partial, final, alone = values
        found[number].append(Hop(*integers, bool(partial), bool(final), bool(alone)))
    assert list(found) == sorted(found)
    return list(found.values())


def delivered(route: Route, owners: Placement) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(expert, device) -> pieces that arrived in a gather; checks that devices send only what they have."""
    has = {(e, d): {(0, 1): -1} for e, d in enumerate(owners.owners.tolist())}
    came: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, hops in enumerate(rounds(route)):
        for h in hops:
            arrived = has.get((h.expert, h.src), {})
            since = arrived.get((0, 1), arrived.get((h.piece, h.pieces)))
            assert since is not None, f"{h} carries what its sender does not have"
            assert since < number, f"{h} carries what comes in its own round"
        for h in hops:
            has.setdefault((h.expert, h.dst), {})[h.piece, h.pieces] = number
            came[h.expert, h.dst].append((h.piece, h.pieces))
    return came


@settings(max_examples=200, deadline=None)
@given(settings_of())
def test_gather_delivers_every_piece_once_and_in_time(
    setting: tuple[Placement, Placement, Topology, Links, int],
) -> None:
    owners, holders, topology, links, chunk = setting
    route = gather_route(owners, holders, topology, links, chunk)
    came = delivered(route, owners)
    wanted = {(int(e), int(d)) for e, d in zip(*(holders - owners).matrix.nonzero(), strict=True)}
    assert came.keys() == wanted
    for pieces in came.values():
        assert sorted(pieces) == [(p, pieces[0][1]) for p in range(pieces[0][1])]


Sum = list[list[int]]
"""Contributors in the order in which they were added, per node."""


class Device:
    """The sums of one device in a reduction."""

    def __init__(self, rank: int, topology: Topology) -> None:
        self.rank, self.topology = rank, topology
        self.sums: dict[tuple, list[tuple[int, Sum]]] = defaultdict(list)

    def fold(self, key: tuple, own: bool) -> Sum:
        """Add up the parts and, if `own`, this device's contribution, node by node."""
        parts = self.sums.pop(key, [])
        if own:
            place = sum(first < self.rank for first, _ in parts)
            parts.insert(place, (self.rank, [[self.rank]]))
        total: Sum = []
        node = -1
        for first, value in parts:
            if self.topology.node_of(first) == node:
                assert len(value) == 1, "a sum of several nodes inside a node"
                total[-1] = total[-1] + value[0]
            else:
                total = total + value
            node = self.topology.node_of(first)
        return total


def summed(route: Route, holders: Placement, topology: Topology, wider: bool) -> dict[tuple[int, int, int, int], Sum]:
    """(owner, expert, piece, pieces) -> the order in which its final result was added up."""
    devices = [Device(d, topology) for d in range(topology.num_devices)]
    sends = {(h.expert, h.piece, h.src) for hops in rounds(route) for h in hops}
    finals: set[tuple[int, int, int, int]] = set()
    alone: dict[tuple[int, int], bool] = {}
    for hops in rounds(route):
        payloads = []
        seen = set()
        for h in hops:
            in_place = h.alone and not wider
            assert in_place or (h.src, h.dst) not in seen, "more than one staged piece of a peer in a round"
            seen.add((h.src, h.dst) if not in_place else None)
            contributes = bool(holders.matrix[h.expert, h.src])
            value = devices[h.src].fold((h.expert, h.piece, False), contributes)
            assert h.first == value[0][0]
            assert h.partial == (sum(map(len, value)) > 1)
            payloads.append(value)
        for h, value in zip(hops, payloads, strict=True):
            devices[h.dst].sums[h.expert, h.piece, h.final].append((h.first, value))
            if h.final:
                finals.add((h.dst, h.expert, h.piece, h.pieces))
                alone[h.expert, h.piece] = h.alone
    result = {}
    for owner, expert, piece, pieces in finals:
        own = bool(holders.matrix[expert, owner]) and (expert, piece, owner) not in sends
        inputs = devices[owner].sums[expert, piece, True]
        assert alone[expert, piece] == (len(inputs) == 1 and not holders.matrix[expert, owner])
        result[owner, expert, piece, pieces] = devices[owner].fold((expert, piece, True), own)
    assert not any(device.sums for device in devices), "something was added and never used"
    return result


@settings(max_examples=200, deadline=None)
@given(settings_of(), st.sampled_from([1, 2]))
def test_reduction_adds_every_contribution_once_in_the_one_order(
    setting: tuple[Placement, Placement, Topology, Links, int], wider: int
) -> None:
    owners, holders, topology, links, chunk = setting
    route = reduce_route(holders, owners, topology, links, chunk, chunk * wider)
    results = summed(route, holders, topology, wider > 1)
    pieces_of: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for (owner, expert, piece, pieces), value in results.items():
        assert owner == owners.owners[expert]
        contributors = holders.holders_of(expert)
        nodes = np.unique(contributors // topology.devices_per_node)
        assert value == [contributors[contributors // topology.devices_per_node == n].tolist() for n in nodes]
        pieces_of[expert].add((piece, pieces))
    wanted = np.flatnonzero((holders - owners).matrix.any(axis=1))
    assert sorted(pieces_of) == wanted.tolist()
    for pieces in pieces_of.values():
        assert sorted(pieces) == [(p, len(pieces)) for p in range(len(pieces))]


def bound(owners: Placement, holders: Placement, topology: Topology, links: Links, chunk: int) -> int:
    """The lower bound by its definition, one resource after the other."""
    new = (holders - owners).matrix
    node = np.arange(topology.num_devices) // topology.devices_per_node
    home = node[owners.owners]
    into_node = np.array(
        [[new[e, node == n].any() and home[e] != n for n in range(topology.num_nodes)] for e in range(len(home))]
    )
    device = [new[:, d].sum() for d in range(topology.num_devices)]
    device += [new[owners.owners == d].any(axis=1).sum() for d in range(topology.num_devices)]
    border = [*into_node.sum(axis=0), *(into_node[home == n].any(axis=1).sum() for n in range(topology.num_nodes))]
    port = links.device + (links.crossing if topology.num_nodes > 1 else 0)
    return max(int(max(device)) * chunk * 10**9 // port, int(max(border)) * chunk * 10**9 // links.border)


@settings(max_examples=100, deadline=None)
@given(settings_of())
def test_states_its_bound_and_is_never_slower_than_direct(
    setting: tuple[Placement, Placement, Topology, Links, int],
) -> None:
    owners, holders, topology, links, chunk = setting
    gather = gather_route(owners, holders, topology, links, chunk)
    reduce = reduce_route(holders, owners, topology, links, chunk, chunk)
    expected = bound(owners, holders, topology, links, chunk)
    for route in (gather, reduce):
        assert route.bound_ns == expected
        assert route.bound_ns <= route.predicted_ns <= route.direct_ns


def hot(topology: Topology, experts: int) -> tuple[Placement, Placement]:
    owners = Placement.even(64, topology.num_devices)
    matrix: NDArray[np.bool_] = owners.matrix.copy()
    matrix[:experts] = True
    return owners, Placement(matrix)


@pytest.mark.parametrize("experts", [1, 4])
def test_a_hot_expert_crosses_a_border_once_per_node(experts: int) -> None:
    topology = Topology(8, 4)
    owners, holders = hot(topology, experts)
    for route in (
        gather_route(owners, holders, topology, SLOW_BORDER, 4 * MIB),
        reduce_route(holders, owners, topology, SLOW_BORDER, 4 * MIB, 4 * MIB),
    ):
        crossing = route.hops[route.hops[:, 4] // 4 != route.hops[:, 5] // 4]
        assert sum(1 / pieces for pieces in crossing[:, 3].tolist()) == experts
        assert route.predicted_ns <= 1.2 * route.bound_ns
        assert route.direct_ns >= 3.9 * route.bound_ns


def test_routes_are_cached_by_placement_pair() -> None:
    topology = Topology(8, 4)
    owners, holders = hot(topology, 1)
    first = gather_route(owners, holders, topology, SLOW_BORDER, MIB)
    again = gather_route(Placement(owners.matrix), Placement(holders.matrix), topology, SLOW_BORDER, MIB)
    assert again is first
    assert first.part(3) is first.part(3)


def test_bad_links_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"Links\.border=0: must be an integer >= 1"):
        Links(1, 1, 1, 0, 0, 0)
    owners, holders = hot(Topology(8, 4), 1)
    with pytest.raises(
        ValueError, match=r"must both be \[num_experts, num_devices\] with the topology's num_devices=4"
    ):
        gather_route(owners, holders, Topology(4, 4), HOST, MIB)
