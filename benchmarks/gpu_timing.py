"""What the steps of `gpu_check.py` share: figures handed to the collecting process, times, and the two ceilings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.report import Row

__all__ = ["copy_ceiling", "emit", "matmul_ceiling", "seconds"]


def emit(setting: str, subject: str, metric: str, value: float, unit: str = "") -> None:
    """Hand one figure to the process that collects them."""
    print(json.dumps(asdict(Row(setting, subject, metric, value, unit))), flush=True)


def seconds(
    run: Callable[..., object],
    device: torch.device,
    repeats: int = 9,
    prepare: Callable[[], tuple[Any, ...]] = tuple,
) -> float:
    """Median time of `run(*prepare())` without that of `prepare`, after two runs that are not counted."""
    repeats = repeats if device.type == "cuda" else 1
    times = [_once(run, prepare(), device) for _ in range(repeats + 2)][2:]
    return sorted(times)[len(times) // 2]


def _once(run: Callable[..., object], given: tuple[Any, ...], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run(*given)
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(*given)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_ceiling(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy of bfloat16 numbers."""
    source = torch.ones(2**29 if device.type == "cuda" else 2**20, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def matmul_ceiling(device: torch.device) -> float:
    """Operations per second of a large product in bfloat16, of random numbers (a GPU is faster on constant ones)."""
    n = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)
