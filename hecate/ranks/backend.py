"""Finds out which backend of a process group serves which type of device."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hecate.ranks.device import own_device

__all__ = ["backend_of", "device_types", "small_tensor_device"]


def backend_of(group: dist.ProcessGroup, device_type: str) -> str:
    """Name of the backend that carries tensors of that device type, e.g. "gloo" or "nccl".

    Raises:
        ValueError: the group has none for it.
    """
    backends = _backends(group)
    if device_type not in backends:
        raise ValueError(
            f"the process group has backends {backends}, none for device type {device_type!r}; "
            f"make it with backend='{device_type}:...', or keep the rows on {' or '.join(backends)}"
        )
    return backends[device_type]


def small_tensor_device(group: dist.ProcessGroup) -> torch.device:
    """Device for small tensors that ranks exchange: the CPU if the group has a backend for it, else the accelerator."""
    kind = next(iter(sorted(_backends(group), key=lambda kind: kind != "cpu")))
    return own_device(kind)


def device_types(group: dist.ProcessGroup) -> set[str]:
    """The device types that the group has a backend for."""
    return set(_backends(group))


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    """Device type -> backend, parsed from torch's format "cpu:gloo,cuda:nccl"."""
    return dict(pair.split(":", 1) for pair in dist.get_backend_config(group).split(","))
