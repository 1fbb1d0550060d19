"""Why a layer has no copies, in words: from its last plan and from what the policy was told."""

from __future__ import annotations

from hecate.planning.calibrate import parts_per_million, target_load
from hecate.planning.plan import Plan
from hecate.policies.balanced import Balanced, waits_for_the_gate
from hecate.policies.base import LayerSetting, Policy, Weighing

__all__ = ["milliseconds", "why_no_copies"]


def why_no_copies(plan: Plan, setting: LayerSetting, policy: Policy, planned: bool) -> str:
    """A sentence like "no copies: hiding budget 0 and calibration does not pay (saves 0.8 ms, costs 1.3 ms)".

    Args:
        plan: a plan without copies.
        setting: what it was planned under.
        policy: the policy that planned.
        planned: whether loads were known before the step.
    """
    return f"no copies: {_reason(plan, setting, policy, planned)}"


def _reason(plan: Plan, setting: LayerSetting, policy: Policy, planned: bool) -> str:
    loads, dial = plan.device_loads, setting.max_imbalance
    if len(loads) == 1:
        return "there is one device"
    if not policy.copies:
        return f"the policy {type(policy).__name__} makes none"
    if not setting.memory_slots:
        return "memory_slots=0"
    if int(loads.max()) <= target_load(int(loads.sum()), len(loads), parts_per_million(dial)):
        return f"imbalance {plan.imbalance:.3f} without them is within max_imbalance={dial:g}"
    if not isinstance(policy, Weighing):
        return f"the policy {type(policy).__name__} chose none"
    ahead = _ahead(setting, policy) if planned else "no past loads to plan from"
    return f"{ahead} and {_after_the_gate(plan, setting)}"


def _ahead(setting: LayerSetting, policy: Policy) -> str:
    """Why none were planned before the step."""
    crosses, cost = setting.topology.num_nodes > 1, setting.cost
    budget = cost.hidden_ns(setting.tokens_per_device)
    if setting.overlap_degree != "auto":
        return f"overlap_degree={setting.overlap_degree}"
    if not budget:
        return "hiding budget 0"
    if isinstance(policy, Balanced) and waits_for_the_gate(setting):
        return f"{cost.model.hidden_permille / 10:g} % of a copy's time is hidden, less than half"
    copy = cost.model.transfer_ns(cost.expert_bytes, crosses)
    return f"hiding budget {milliseconds(budget)} (a copy takes {milliseconds(copy)})"


def _after_the_gate(plan: Plan, setting: LayerSetting) -> str:
    """Why none were added when the loads were known."""
    known = plan.calibration
    if not setting.calibrate:
        return "calibrate=False"
    if known is None or known.saved_ns is None or known.price_ns is None:
        return "calibration found none"
    return f"calibration does not pay (saves {milliseconds(known.saved_ns)}, costs {milliseconds(known.price_ns)})"


def milliseconds(nanoseconds: int) -> str:
    """E.g. "1.3 ms", with two significant digits."""
    value = nanoseconds / 1e6
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.2g} ms"
