"""Policies decide which experts are copied and moved, and when. `get_policy` finds one by name."""

from __future__ import annotations

from hecate.policies.balanced import Balanced
from hecate.policies.base import LayerSetting, Policy
from hecate.policies.ep import ExpertParallel
from hecate.policies.exact import Exact
from hecate.policies.fastermoe import FasterMoE
from hecate.policies.flexmoe import FlexMoE
from hecate.policies.hecate import Hecate
from hecate.policies.smartmoe import SmartMoE

__all__ = ["LayerSetting", "Policy", "get_policy"]


def get_policy(name: str) -> Policy:
    """The policy that `FSSDPConfig.policy` calls `name`; otherwise ValueError listing the valid names."""
    policies: dict[str, type[Policy]] = {
        "balanced": Balanced,
        "hecate": Hecate,
        "ep": ExpertParallel,
        "fastermoe": FasterMoE,
        "smartmoe": SmartMoE,
        "flexmoe": FlexMoE,
        "exact": Exact,
    }
    if name not in policies:
        raise ValueError(f"policy={name!r}: must be one of {', '.join(map(repr, policies))}")
    return policies[name]()
