"""Whether Hecate's kernels run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hecate.config import KernelChoice
from hecate.ops.kernels.cuda import missing
from hecate.ops.kernels.tokens import MAX_EXPERTS

__all__ = ["Work", "reason_against", "wanted"]

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes in which the kernels compute for training."""


@dataclass(frozen=True)
class Work:
    """What one MoE layer asks of the kernels.

    Attributes:
        name: name of the layer.
        num_experts: number of its experts.
        dtypes: dtypes of their weights where they are owned and where they compute.
    """

    name: str
    num_experts: int
    dtypes: tuple[torch.dtype, torch.dtype]


def wanted(choice: KernelChoice, device: torch.device) -> bool:
    """Whether `choice` means the kernels on `device`: "auto" does on CUDA; on the CPU torch's operations are faster."""
    return choice == "hecate" or (choice == "auto" and device.type == "cuda")


def reason_against(choice: KernelChoice, device: torch.device, work: Iterable[Work] = ()) -> str | None:
    """Why the kernels cannot do the `work` on `device`, in one line; None: they can, or are not wanted.

    Raises:
        RuntimeError: they cannot, and the user asked for them by name.
    """
    if not wanted(choice, device):
        return None
    reason = missing(device) or next(filter(None, map(_unfit, work)), None)
    if reason is not None and choice == "hecate":
        raise RuntimeError(f'kernels="hecate": {reason}; use kernels="auto" or kernels="torch" to run without them')
    return reason


def _unfit(work: Work) -> str | None:
    for dtype, has in zip(work.dtypes, ("has weights", "computes"), strict=True):
        if dtype not in DTYPES:
            return f"{work.name} {has} in {dtype}, they know {' and '.join(map(str, DTYPES))}"
    if work.num_experts > MAX_EXPERTS:
        return f"{work.name} has {work.num_experts} experts, they sort at most {MAX_EXPERTS}"
    return None
