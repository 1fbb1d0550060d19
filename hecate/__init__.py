"""Hecate: train Mixture-of-Experts models with fully sharded sparse data parallelism (FSSDP, arXiv 2502.02581)."""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("hecate._native") is None:  # a clone that is not built, and Python found it before the installed package
    from hecate.clone import installed_package

    __path__[:] = [installed_package(__version__)]

from hecate.adapters.stack import stack_experts
from hecate.advise import advise
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
    "__version__",
    "advise",
    "fully_shard",
    "plan",
    "sparse_all_gather",
    "sparse_reduce_scatter",
    "stack_experts",
    "verify",
]
