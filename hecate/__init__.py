"""Hecate: train Mixture-of-Experts models with fully sharded sparse data parallelism (FSSDP, arXiv 2502.02581)."""

from hecate.adapters.stack import stack_experts
from hecate.api import FSSDP, fully_shard
from hecate.collectives.functional import sparse_all_gather, sparse_reduce_scatter
from hecate.config import FSSDPConfig
from hecate.placement import Placement, Topology
from hecate.planning.limits import LinkBudget
from hecate.planning.planner import plan
from hecate.verify import verify

__all__ = [
    "FSSDP",
    "FSSDPConfig",
    "LinkBudget",
    "Placement",
    "Topology",
    "fully_shard",
    "plan",
    "sparse_all_gather",
    "sparse_reduce_scatter",
    "stack_experts",
    "verify",
]
