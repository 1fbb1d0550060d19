"""Training on two nodes, with routed copies and the node-aware exchange, compared with the dense model."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import mock

import hecate
from hecate.cost import CostModel
from hecate.runtime.tokens import dispatch
from tests.runtime.reference import TINY, Case, compare
from tests.workers import Groups

# Links between nodes so slow that sending each row across only once always pays.
SLOW_BORDER = CostModel(intra_node_bandwidth=10**12, inter_node_bandwidth=1000, message_ns=0, hidden_permille=800)
CASE = Case(hecate.FSSDPConfig(cost=SLOW_BORDER), model=replace(TINY, top_k=4), steps=3)


def compare_on_two_nodes() -> int:
    """How often the node-aware exchange was used."""
    with (
        mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2"),
        mock.patch.object(dispatch, "node_dispatch", wraps=dispatch.node_dispatch) as made,
    ):
        compare(CASE)
    return made.call_count


def test_equals_the_dense_model_on_two_nodes(groups: Groups) -> None:
    made = groups(4).run(compare_on_two_nodes)
    assert min(made) > 0
