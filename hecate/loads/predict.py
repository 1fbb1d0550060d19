"""Load history and what it predicts: integer loads of the next step, and pessimistic guesses around them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Predictor", "guesses", "predict"]

Int64 = NDArray[np.int64]
Predictor = Literal["window", "recent"]

GUESSES = 24
NOISE_PERMILLE = (1500, 3000, 6000, 12000)
LEAST_NOISE_PERMILLE = 150


def predict(history: Int64, predictor: Predictor = "window") -> Int64:
    """Loads of the next step, int64 `[num_experts]`, from history int64 `[steps >= 1, num_devices, num_experts]`.

    "window": mean of the steps (paper, w = 5). "recent": each step counts twice as much as the one before it.
    """
    loads = history.sum(axis=1)
    if predictor == "window":
        weights = np.ones(len(loads), dtype=np.int64)
    elif predictor == "recent":
        weights = np.left_shift(1, np.arange(len(loads), dtype=np.int64))
    else:
        raise ValueError(f"predictor={predictor!r}: must be one of 'window', 'recent'")
    return (weights[:, None] * loads).sum(axis=0) // weights.sum()


def guesses(history: Int64, predictor: Predictor = "recent") -> Int64:
    """Possible loads of the next step, int64 `[levels, guesses, num_experts]`, each level more pessimistic.

    A bootstrap: each guess gives every expert the prediction plus its deviation in some past step, times a factor
    that grows with the level; at least 15 % of the prediction, so that a still history is not trusted blindly.
    """
    mean, loads = predict(history, predictor), history.sum(axis=1)
    experts = np.arange(len(mean), dtype=np.uint64)
    draw = _mix(experts[None, :] + np.arange(1, GUESSES, dtype=np.uint64)[:, None] * np.uint64(1 << 32))
    past = loads[(draw % np.uint64(len(loads))).astype(np.int64), experts.astype(np.int64)] - mean
    sign = np.where(draw >> np.uint64(63), 1, -1)
    least = mean * LEAST_NOISE_PERMILLE // 1000
    deviation = np.where(np.abs(past) < least, sign * least, past)
    levels = [np.concatenate([mean[None], np.maximum(0, mean + deviation * f // 1000)]) for f in NOISE_PERMILLE]
    return np.ascontiguousarray(np.stack(levels))


def _mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: well mixed bits, the same on every machine."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
