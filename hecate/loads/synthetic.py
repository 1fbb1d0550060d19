"""Seeded router loads for tests and benchmarks: uniform, zipf, hot and drift."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["LoadKind", "synthetic_loads"]

LoadKind = Literal["uniform", "zipf", "hot", "drift"]
Int64 = NDArray[np.int64]


def synthetic_loads(
    kind: LoadKind,
    num_devices: int,
    num_experts: int,
    tokens_per_device: int,
    top_k: int,
    seed: int,
    *,
    steps: int = 1,
    exponent: float = 1.0,
    hot_logit: float = 4.0,
    spread: float = 0.2,
    drift_rate: float = 0.05,
    drift_std: float = 0.6,
    step_noise: float = 0.05,
) -> Int64:
    """Int64 `[steps, num_devices, num_experts]`: how many of its tokens each device routes to each expert.

    Every token picks the `top_k` experts with the largest sum of logit and Gumbel noise, which samples experts without
    replacement in proportion to exp(logit). Each device adds normal noise of standard deviation `spread` to all logits.

    Args:
        kind: "uniform": equal logits; "zipf": popularity rank**-exponent, ranks shuffled; "hot": one expert has the
            logit `hot_logit`; "drift": "zipf" plus an AR(1) process per expert (rate `drift_rate` per step, stationary
            standard deviation `drift_std`) and independent noise per step (`step_noise`).
        num_devices: number of devices.
        num_experts: number of experts.
        tokens_per_device: tokens per device and step; each device's counts sum to this times `top_k`.
        top_k: number of distinct experts that a token picks, at most `num_experts`.
        seed: the same seed gives the same loads.
        steps: number of steps; the popularity of experts changes between them with "drift" only.
        exponent: exponent of "zipf" and "drift".
        hot_logit: logit of the hot expert; all others have 0.
        spread: standard deviation of the noise per device; not used by "uniform".
        drift_rate: see "drift".
        drift_std: see "drift".
        step_noise: standard deviation, see "drift".
    """
    if kind not in get_args(LoadKind):
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(map(repr, get_args(LoadKind)))}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be in [1, num_experts={num_experts}]")
    rng = np.random.default_rng([seed, get_args(LoadKind).index(kind), num_devices, num_experts])
    logits = np.zeros(num_experts)
    if kind in ("zipf", "drift"):
        logits = rng.permutation(-exponent * np.log(np.arange(1, num_experts + 1)))
    elif kind == "hot":
        logits[rng.integers(num_experts)] = hot_logit
    tilt = rng.normal(0, 0 if kind == "uniform" else spread, (num_devices, num_experts))
    walk = rng.normal(0, drift_std, num_experts) if kind == "drift" else np.zeros(num_experts)
    loads = np.empty((steps, num_devices, num_experts), dtype=np.int64)
    for step in range(steps):
        noise = rng.normal(0, step_noise, num_experts) if kind == "drift" else 0
        for device in range(num_devices):
            loads[step, device] = _route(logits + walk + noise + tilt[device], tokens_per_device, top_k, rng)
        if kind == "drift":
            walk = np.sqrt(1 - drift_rate**2) * walk + drift_rate * rng.normal(0, drift_std, num_experts)
    return loads


def _route(logits: NDArray[np.float64], tokens: int, top_k: int, rng: np.random.Generator) -> Int64:
    """Tokens per expert, int64 `[num_experts]`."""
    uniform = rng.random((tokens, len(logits)), dtype=np.float32)
    scores = logits.astype(np.float32) - np.log(-np.log(np.maximum(uniform, np.finfo(np.float32).tiny)))
    picked = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    return np.bincount(picked.ravel(), minlength=len(logits)).astype(np.int64)
