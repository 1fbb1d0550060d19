"""A run in a few numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hecate.train.settings import Settings

__all__ = ["summarize"]

LN2 = math.log(2)


def summarize(metrics: list[dict[str, Any]], settings: Settings, validation_loss: float) -> dict[str, Any]:
    """The run in a few numbers: means over the steps after the first `load_window`, in which history is short."""
    steady = metrics[settings.fssdp.load_window :] or metrics
    bits, bytes_per_token = validation_loss / LN2, settings.data.bytes_per_token

    def mean(name: str) -> float:
        return float(np.mean([m[name] for m in steady]))

    return {
        "name": settings.name,
        "policy": settings.fssdp.policy,
        "devices": settings.devices,
        "steps": len(metrics),
        "tokens": sum(m["tokens"] for m in metrics),
        "train_loss": metrics[-1]["loss"],
        "val_bits_per_token": bits,
        "val_bits_per_byte": bits / bytes_per_token if bytes_per_token else None,
        "tokens_per_second": sum(m["tokens"] for m in steady) / sum(m["seconds"] for m in steady),
        "imbalance_before": mean("imbalance_before"),
        "imbalance_after": mean("imbalance_after"),
        "copies_per_step": mean("copies"),
        "bytes_copied": sum(m["bytes_copied"] for m in metrics),
        "exposed_seconds": sum(m["exposed_seconds"] for m in metrics),
        "seconds": sum(m["seconds"] for m in metrics),
    }
