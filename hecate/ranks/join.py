"""Joins the process group of torchrun."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from hecate.ranks.device import own_device

__all__ = ["join"]


def join() -> torch.device:
    """Return the device of this process; under torchrun also join its process group."""
    device = own_device("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    return device
