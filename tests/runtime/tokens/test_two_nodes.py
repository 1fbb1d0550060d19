"""Training on two nodes, with routed copies and the node-aware exchange, compared with the dense model."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import mock

import torch

import hecate
from hecate.cost import CostModel
from hecate.runtime.tokens import dispatch
from tests.runtime.reference import TINY, Case, compare
from tests.workers import Groups

# Links between nodes so slow that sending each row across only once always pays.
SLOW_BORDER = CostModel(intra_node_bandwidth=10**12, inter_node_bandwidth=1000, message_ns=0, hidden_permille=800)
CASE = Case(hecate.FSSDPConfig(cost=SLOW_BORDER), model=replace(TINY, top_k=4), steps=3)


BY_KERNELS = replace(CASE, config=replace(CASE.config, kernels="hecate"), dtype=torch.float32, steps=1)


def compare_on_two_nodes(case: Case) -> int:
    """How often the node-aware exchange was used."""
    with (
        mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2"),
        mock.patch.object(dispatch, "node_dispatch", wraps=dispatch.node_dispatch) as made,
    ):
        compare(case)
    return made.call_count


def test_equals_the_dense_model_on_two_nodes(groups: Groups) -> None:
    for case in (CASE, BY_KERNELS):  # kernels count and activate; rows between nodes are moved by torch
        made = groups(4).run(compare_on_two_nodes, case)
        assert min(made) > 0
