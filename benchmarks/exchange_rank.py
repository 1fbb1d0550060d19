"""What one rank of `benchmarks.collectives` does for tokens: the node-aware exchange compared with the plain one.

A run includes all that a layer does with a plan: make the record, send tokens, get results back and sum them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.collectives_rank import EXPERTS, timed
from benchmarks.report import Report
from hecate.collectives.route import Links
from hecate.cost import CostModel, LayerCost
from hecate.placement import Placement, Topology
from hecate.planning.plan import Plan
from hecate.planning.quota import exact_quota
from hecate.runtime.comms import Comms, ExposedTime, Lane
from hecate.runtime.tokens.by_node import node_dispatch, node_exchange_pays
from hecate.runtime.tokens.direct import direct_dispatch
from hecate.runtime.tokens.exchange import Dispatch

__all__ = ["AWARE", "CHOSEN", "PLAIN_EXCHANGE", "SHARED", "measure_tokens"]

TOKENS, WIDTH = 512, 1024
AWARE, PLAIN_EXCHANGE, CHOSEN = "by node", "plain all-to-all", "chosen"
SHARED = "top-8 in one node"
SETTINGS = ((SHARED, 8, True), ("top-8 anywhere", 8, False), ("top-2 anywhere", 2, False))


def measure_tokens(report: Report, where: str, topology: Topology, links: Links, repeats: int) -> None:
    """Measure both exchanges, with a router that picks all experts of a token in one node, and one that does not."""
    model = CostModel(
        intra_node_bandwidth=links.device,
        inter_node_bandwidth=links.border // topology.devices_per_node,
        message_ns=links.message_ns,
    )
    cost = LayerCost(model, 1, 1, 1, token_bytes=4 * WIDTH, dense_token_flops=1)
    for name, top_k, one_node in SETTINGS:
        picks = [torch.from_numpy(_router(d, top_k, one_node, topology)) for d in range(topology.num_devices)]
        plan = _plan(picks, topology)
        ways = {
            PLAIN_EXCHANGE: partial(_there_and_back, direct_dispatch, plan),
            AWARE: partial(_there_and_back, node_dispatch, plan),
        }
        times: dict[str, list[float]] = {subject: [] for subject in ways}
        index = picks[dist.get_rank()]
        comms = _comms(topology)
        hidden, weights = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, top_k)
        for way in ways.values():
            way(index, hidden, weights, comms)
        for _ in range(repeats):
            for subject, way in ways.items():
                times[subject].append(timed(partial(way, index, hidden, weights, comms)))
        found = {subject: statistics.median(values) for subject, values in times.items()}
        found[CHOSEN] = found[AWARE if node_exchange_pays(plan, cost, top_k) else PLAIN_EXCHANGE]
        for subject, seconds in found.items():
            report.add(f"{where}, tokens, {name}", subject, "exchange time", seconds, "s")


def _comms(topology: Topology) -> Comms:
    """For tokens alone."""
    exposed = ExposedTime()
    cpu = torch.device("cpu")
    copies, gradients, averages = (
        Lane(cpu, exposed, "gather"),
        Lane(cpu, exposed, "reduce"),
        Lane(cpu, exposed, "average"),
    )
    tokens = dist.group.WORLD
    return Comms(
        dist.get_rank(), topology, tokens, None, None, None, None, copies, gradients, averages, exposed, heart=None
    )


def _there_and_back(
    way: Callable[..., Dispatch], plan: Plan, index: Tensor, hidden: Tensor, weights: Tensor, comms: Comms
) -> Tensor:
    held = plan.placement.held_by(comms.rank).tolist()
    record = way(plan, index, comms, held)
    return record.combine(record.dispatch(hidden), weights)


def _router(device: int, top_k: int, one_node: bool, topology: Topology) -> NDArray[np.int64]:
    """`[TOKENS, top_k]` expert ids: each token picks among the experts of one node, or among all."""
    rng = np.random.default_rng(device)
    per_node = EXPERTS // topology.num_nodes if one_node else EXPERTS
    first = rng.integers(0, EXPERTS // per_node, TOKENS) * per_node
    return first[:, None] + np.stack([rng.permutation(per_node)[:top_k] for _ in range(TOKENS)])


def _plan(picks: list[Tensor], topology: Topology) -> Plan:
    placement = Placement.even(EXPERTS, topology.num_devices)
    counts = np.stack([np.bincount(p.flatten().numpy(), minlength=EXPERTS) for p in picks])
    return Plan.build(placement, placement.owners, topology, exact_quota(counts, placement, topology))
