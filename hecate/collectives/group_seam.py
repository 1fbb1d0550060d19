"""The private torch.distributed calls of this package, and why there is no public way.

- A `torch.library` op cannot take a process group, so torch's own collectives pass its name; only a private function
  turns the name back into the group.
- A new group gets the backend's default timeout, not that of the group it refines; the latter is only in its options.
- The store that `init_process_group` made is reachable by a private function alone.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["default_store", "group_named", "timeout_of"]


def group_named(name: str) -> dist.ProcessGroup:
    """The process group whose `group_name` is `name`."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def timeout_of(group: dist.ProcessGroup, device_type: str) -> timedelta:
    """How long a collective of `group` on that device type waits for its peers."""
    return group._get_backend(torch.device(device_type)).options._timeout


def default_store() -> dist.Store:
    """The store that the ranks of this job met in."""
    return distributed_c10d._get_default_store()
