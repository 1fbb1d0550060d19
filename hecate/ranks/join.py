"""Joins the process group of torchrun."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

__all__ = ["join"]


def join() -> torch.device:
    """Return the device of this process; under torchrun also join its process group."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo" if device is None else "cpu:gloo,cuda:nccl")
    return torch.device("cpu") if device is None else device
