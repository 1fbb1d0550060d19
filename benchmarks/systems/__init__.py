"""Systems that train the same model on the same batches: Hecate's policies, and what users would take instead."""

from __future__ import annotations

from benchmarks.systems.base import MissingError, System, Task
from benchmarks.systems.deepspeed_moe import deepspeed_autoep, deepspeed_moe
from benchmarks.systems.fsdp2 import fsdp2
from benchmarks.systems.policies import hecate_policy, is_policy
from benchmarks.systems.transformers_ep import transformers_ep

__all__ = ["CEILING", "OUTSIDE", "MissingError", "System", "Task", "make_system"]

CEILING = "ceiling"
"""Expert parallelism with a router that loads all devices alike."""

OUTSIDE = {
    "fsdp2": fsdp2,
    "transformers-ep": transformers_ep,
    "deepspeed-moe": deepspeed_moe,
    "deepspeed-autoep": deepspeed_autoep,
}
"""Systems that are not Hecate's."""


def make_system(name: str, task: Task) -> System:
    """The system `name`: of `OUTSIDE`, or a policy with settings, as "balanced:reshard_interval=20". Collective.

    Raises:
        ValueError: there is no such system; the message lists the valid ones.
        MissingError: something that it needs is not installed, or it cannot train this model.
    """
    if name == CEILING:
        return hecate_policy("ep", task)
    if name in OUTSIDE:
        return OUTSIDE[name](task)
    if is_policy(name):
        return hecate_policy(name, task)
    raise ValueError(f"system {name!r}: must be one of {', '.join(OUTSIDE)}, or a policy of hecate.FSSDPConfig")
