"""Training under Hecate against the plain model on a GPU: one rank over NCCL, several on one GPU over gloo.

With several, copies and gradients go through pinned memory or over symmetric memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_timing import emit
from hecate import FSSDPConfig
from hecate.ops.grouped import GROUPED_DTYPES
from tests.bench import Bench
from tests.runtime.helpers import config
from tests.runtime.reference import TINY, Case, compare
from tests.workers import Group, WorkerError

__all__ = ["exact", "exact_symmetric"]


@dataclass(frozen=True)
class Setting:
    """How many ranks train over which backend, in which dtype, with whose operations, what carries copies, and who
    divides tokens.
    """

    ranks: int
    backend: str
    dtype: torch.dtype
    kernels: str
    transport: str = "messages"
    splits: str = "host"

    def __str__(self) -> str:
        of = "Hecate's kernels" if self.kernels == "hecate" else "torch's operations"
        also = ", symmetric memory" if self.transport == "symmetric" else ""
        also += ", splits on the device" if self.splits == "device" else ""
        return f"{self.ranks} ranks over {self.backend}, {self.dtype}, {of}{also}"

    @property
    def config(self) -> FSSDPConfig:
        """With splits on the device there is no calibration; room for all rows of `TINY`, and no copies."""
        more: dict[str, Any] = {"rematerialize": self.ranks == 2}
        if self.splits == "device":
            more = {"splits": "device", "calibrate": False, "rows_per_pair": 64 if self.ranks > 1 else None}
        policy = "balanced" if self.splits == "host" else "ep"
        return config(policy, kernels=self.kernels, transport=self.transport, **more)


def settings(device: torch.device) -> Iterator[Setting]:
    """One rank first; with torch's operations once, to tell a fault of a kernel from one of the runtime."""
    on_cuda = device.type == "cuda"
    for ranks, backend in ((1, "nccl" if on_cuda else "gloo"), (2, "gloo"), (4, "gloo")):
        for dtype in (torch.float32, torch.bfloat16):
            yield Setting(ranks, backend, dtype, "hecate")
        if ranks == 2:
            yield Setting(ranks, backend, torch.float32, "torch")
        if ranks < 4:
            yield Setting(ranks, backend, GROUPED_DTYPES[device.type], "hecate", splits="device")


def exact(device: torch.device) -> None:
    """Losses, gradients and parameters of two steps; a line per setting on stderr if it fails."""
    _run(device, settings(device))


def exact_symmetric(device: torch.device) -> None:
    """The same for 2 and 4 ranks on one device whose copies and gradients go over symmetric memory."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # torch's leave for several ranks on one GPU
    dtypes = (torch.float32, torch.bfloat16)
    _run(device, (Setting(ranks, "gloo", dtype, "hecate", "symmetric") for ranks in (2, 4) for dtype in dtypes))


def _run(device: torch.device, wanted: Iterable[Setting]) -> None:
    failed, group, of = [], None, (0, "")
    for setting in wanted:
        if group is None or of != (setting.ranks, setting.backend):
            _close(group)
            bench = Bench(device.type, setting.backend)
            group, of = Group(setting.ranks, start="spawn", bench=bench), (setting.ranks, setting.backend)
        case = Case(setting.config, model=TINY, dtype=setting.dtype, accumulate=2, steps=2)
        try:
            group.run(compare, case)
        except WorkerError as error:
            print(f"{setting}: {error}", file=sys.stderr, flush=True)
            failed.append(str(setting))
            _close(group)
            group = None
        emit("tiny GPT-MoE against the plain model", str(setting), "equal within rounding", float(group is not None))
    _close(group)
    if failed:
        raise SystemExit(f"differ from the plain model: {'; '.join(failed)}")


def _close(group: Group | None) -> None:
    if group is not None:
        group.close()
