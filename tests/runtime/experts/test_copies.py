"""The states of a layer's copies: which operations each state allows, and how much memory it takes."""

from __future__ import annotations

from typing import Any

import torch

from hecate.placement import Placement
from hecate.runtime.experts.copies import CopyState, LayerCopies
from tests.runtime.helpers import Pair, error_of, floats, net, rank, world
from tests.workers import Groups


def _states(rematerialize: bool) -> None:
    pair = Pair(net((4,)), dense="replicate", rematerialize=rematerialize, memory_slots=2)
    pair.model(floats(0, 0)[:0])  # reserves the buffers that layers share
    layer = pair.engine._engine.layers[0].experts
    layer.arena.free()
    before = layer.arena.num_bytes
    owners = layer.owners
    one, all_ = owners.matrix.copy(), owners.matrix.copy()
    one[0] = all_[:2] = True
    copies = LayerCopies(layer, Placement(one))

    def refused(act: Any, state: CopyState, needed: CopyState) -> None:
        assert copies.state is state
        error = error_of(act)
        assert error == f"RuntimeError: moes.0.experts: its copies are {state.value}, must be {needed.value}", error
        assert copies.state is state

    sharded, gathering, held = CopyState.SHARDED, CopyState.GATHERING, CopyState.HELD
    refused(copies.parts, sharded, held)
    refused(lambda: copies.reduce({}, {}), sharded, held)
    refused(lambda: copies.extend(Placement(all_)), sharded, gathering)
    copies.launch()
    refused(copies.parts, gathering, held)
    refused(lambda: copies.reduce({}, {}), gathering, held)
    copies.launch()  # the gather is now in progress
    copies.extend(Placement(all_))
    copies.ensure_held()
    refused(lambda: copies.extend(Placement(all_)), held, gathering)
    # Memory for the copies that are made, which all are of rank 0's experts; none for slots.
    assert layer.arena.num_bytes - before == (0 if rematerialize else 2 * rank() * layer.layout.numel * 8)
    _check_rows(pair, copies)
    copies.release()
    copies.release()
    layer.arena.free()
    assert layer.arena.num_bytes == before
    refused(copies.parts, sharded, held)
    copies.ensure_held()  # gathers all of them again
    _check_rows(pair, copies)
    copies.release()
    copies = LayerCopies(layer, Placement(one))
    copies.launch()
    copies.extend(Placement(all_))  # now there is room for what is added: copies are one stack
    copies.ensure_held()
    assert len(copies.parts()) == 1 + rank()
    _check_rows(pair, copies)
    copies.release()


def _check_rows(pair: Pair, copies: LayerCopies) -> None:
    """Check that every expert held here has the plain model's weights."""
    experts = pair.plain.moes[0].experts
    seen = []
    for positions, weights in copies.parts():
        for kind, rows in weights.items():
            held = [copies.experts[i] for i in positions]
            assert torch.equal(rows, getattr(experts, kind)[held])
        seen += positions
    assert seen == list(range(len(copies.experts)))
    assert set(copies.experts) == set(copies.placement.held_by(copies.layer.comms.rank).tolist())
    assert world() == 1 or len(copies.experts) >= 2


def test_states(groups: Groups) -> None:
    for rematerialize in (False, True):
        groups(2).run(_states, rematerialize)
