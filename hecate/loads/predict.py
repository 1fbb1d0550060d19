"""Predicts the loads of the next step from past ones: one integer prediction, and pessimistic guesses around it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Predictor", "guesses", "predict", "predict_by_device"]

Int64 = NDArray[np.int64]
Predictor = Literal["window", "recent"]

GUESSES = 24
NOISE_PERMILLE = (1500, 3000, 6000, 12000)
LEAST_NOISE_PERMILLE = 150


def predict(history: Int64, predictor: Predictor = "window") -> Int64:
    """Predicted loads of the next step, int64 `[num_experts]`.

    `history` is int64 `[steps >= 1, num_devices, num_experts]`, oldest first. Predictor "window" takes the mean of the
    steps (the paper's, with w = 5); "recent" gives each step twice the weight of the one before it.
    """
    return _mean(history.sum(axis=1), predictor)


def predict_by_device(history: Int64, predictor: Predictor = "recent") -> Int64:
    """Predicted counts of the next step, int64 `[num_devices, num_experts]`; arguments are those of `predict`."""
    return _mean(history, predictor)


def _mean(loads: Int64, predictor: Predictor) -> Int64:
    """The mean over the steps, the first dimension."""
    if predictor == "window":
        weights = np.ones(len(loads), dtype=np.int64)
    elif predictor == "recent":
        weights = np.left_shift(1, np.arange(len(loads), dtype=np.int64))
    else:
        raise ValueError(f"predictor={predictor!r}: must be one of 'window', 'recent'")
    return np.tensordot(weights, loads, axes=1) // weights.sum()


def guesses(history: Int64, predictor: Predictor = "recent") -> Int64:
    """Possible loads of the next step, int64 `[levels, guesses, num_experts]`; each level is more pessimistic.

    A bootstrap: a guess takes, per expert, the prediction plus the expert's deviation from it in a randomly chosen past
    step, times a factor that grows with the level. Deviations are at least 15 % of the prediction, so that loads that
    have not changed so far are still allowed to change. The first guess of each level is the prediction.
    """
    loads = history.sum(axis=1)
    mean = _mean(loads, predictor)
    experts = np.arange(len(mean), dtype=np.uint64)
    draw = _mix(experts[None, :] + np.arange(1, GUESSES, dtype=np.uint64)[:, None] * np.uint64(1 << 32))
    past = loads[(draw % np.uint64(len(loads))).astype(np.int64), experts.astype(np.int64)] - mean
    sign = np.where(draw >> np.uint64(63), 1, -1)
    least = mean * LEAST_NOISE_PERMILLE // 1000
    deviation = np.where(np.abs(past) < least, sign * least, past)
    levels = [np.concatenate([mean[None], np.maximum(0, mean + deviation * f // 1000)]) for f in NOISE_PERMILLE]
    return np.ascontiguousarray(np.stack(levels))


def _mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64, as a random number generator that gives the same bits on every machine."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
