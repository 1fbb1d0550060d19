"""Hecate: train Mixture-of-Experts models with fully sharded sparse data parallelism (FSSDP, arXiv 2502.02581)."""

from hecate.config import FSSDPConfig
from hecate.placement import Placement, Topology

__all__ = ["FSSDPConfig", "Placement", "Topology"]
