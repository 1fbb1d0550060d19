"""Loads for simulations of any size: counts drawn per device, without drawing every token.

`loads.synthetic` draws each token's experts; for 1024 devices that takes minutes. Here the counts of a device are one
multinomial draw over the probabilities with which a token's top-k choice contains each expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kind", "Scenario", "even_counts", "inclusion"]

Int64 = NDArray[np.int64]
Floats = NDArray[np.float64]
Kind = Literal["even", "uniform", "zipf", "drift", "bursts"]

NEWTON_STEPS = 100
"""At most; some ten are taken."""
LEAST_LOGIT = -600.0
"""Below the largest one: what is rarer is never drawn, and a smaller rate would be rounded to 0."""


@dataclass(frozen=True)
class Scenario:
    """How popular experts are, and how that changes from step to step.

    Attributes:
        kind: "even": every expert gets equally many tokens of every device, within one; "uniform": equal
            probabilities; "zipf": popularity `rank ** -exponent`, ranks shuffled per layer; "drift": "zipf" plus an
            AR(1) process per expert and noise per step; "bursts": "drift", and from time to time one expert is hot for
            `burst_steps` steps.
        exponent: of the Zipf law; 0 is uniform.
        spread: standard deviation of the noise that each device adds to the logits.
        drift_rate: of the AR(1) process, per step.
        drift_std: its standard deviation.
        step_noise: standard deviation of the independent noise per expert and step.
        burst_chance: probability that a burst begins in a step.
        burst_steps: how many steps a burst lasts.
        burst_logit: what a burst adds to the expert's logit.
        seed: equal seeds give equal loads.
    """

    kind: Kind = "drift"
    exponent: float = 0.6
    spread: float = 0.2
    drift_rate: float = 0.1
    drift_std: float = 0.6
    step_noise: float = 0.15
    burst_chance: float = 0.25
    burst_steps: int = 3
    burst_logit: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"loads.kind={self.kind!r}: must be one of {', '.join(map(repr, get_args(Kind)))}")
        for name in ("exponent", "spread", "drift_std", "step_noise", "burst_logit"):
            _in(name, getattr(self, name), 0, 100)
        _in("drift_rate", self.drift_rate, 0, 1)
        _in("burst_chance", self.burst_chance, 0, 1)
        _in("burst_steps", self.burst_steps, 1, 10**6)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"loads.seed={self.seed!r}: must be an integer >= 0")

    def steps(self, layer: int, num_devices: int, num_experts: int, tokens: int, top_k: int) -> Iterator[Int64]:
        """The counts of one layer, int64 `[num_devices, num_experts]` per step, without end.

        Args:
            layer: its number; layers differ in which experts are popular.
            num_devices: number of devices.
            num_experts: number of experts.
            tokens: tokens of each device in a step.
            top_k: experts per token.
        """
        if self.kind == "even":
            while True:
                yield even_counts(num_devices, num_experts, tokens * top_k)
        rng = np.random.default_rng([self.seed, layer, num_devices, num_experts])
        base = self._base(num_experts, rng)
        tilt = rng.normal(0, 0 if self.kind == "uniform" else self.spread, (num_devices, num_experts))
        drifts, bursts = self.kind in ("drift", "bursts"), self.kind == "bursts"
        walk = rng.normal(0, self.drift_std, num_experts) if drifts else np.zeros(num_experts)
        hot, left = 0, 0
        while True:
            logits = base + walk + (rng.normal(0, self.step_noise, num_experts) if drifts else 0)
            if bursts and not left and rng.random() < self.burst_chance:
                hot, left = int(rng.integers(num_experts)), self.burst_steps
            if left:
                logits[hot] += self.burst_logit
                left -= 1
            yield _counts(inclusion(logits + tilt, top_k), tokens, top_k, rng)
            if drifts:
                rate = self.drift_rate
                walk = np.sqrt(1 - rate**2) * walk + rate * rng.normal(0, self.drift_std, num_experts)

    def _base(self, num_experts: int, rng: np.random.Generator) -> Floats:
        if self.kind == "uniform":
            return np.zeros(num_experts)
        return rng.permutation(-self.exponent * np.log(np.arange(1, num_experts + 1)))


def even_counts(num_devices: int, num_experts: int, rows: int) -> Int64:
    """Int64 `[num_devices, num_experts]`: `rows` per device, and per expert equally many, within one."""
    each, extra = divmod(rows, num_experts)
    counts = np.full((num_devices, num_experts), each, dtype=np.int64)
    devices = np.arange(num_devices)[:, None]
    counts[devices, (devices * extra + np.arange(extra)) % num_experts] += 1  # goes on where the device before ended
    return counts


def inclusion(logits: Floats, top_k: int) -> Floats:
    """The probability that a token's `top_k` choices contain an expert, `[..., E]`; they sum to `top_k`.

    The `top_k` largest sums of logit and Gumbel noise are the first `top_k` of independent exponential clocks of rate
    exp(logit). By a common time t a clock has rung with probability 1 - exp(-rate t); t is chosen so that `top_k` have.
    """
    experts = logits.shape[-1]
    rates = np.exp(np.maximum(logits - logits.max(axis=-1, keepdims=True), LEAST_LOGIT))
    if top_k >= experts:
        return np.ones_like(rates)
    time = np.zeros(rates.shape[:-1])
    for _ in range(NEWTON_STEPS):  # from the left, where the number that have rung is a concave function of time
        silent = np.exp(-rates * time[..., None])
        missing = top_k - experts + silent.sum(-1)
        time += missing / (rates * silent).sum(-1)
        if (missing < 1e-9 * top_k).all():
            break
    found = 1 - np.exp(-rates * time[..., None])
    return found * (top_k / found.sum(-1, keepdims=True))


def _counts(probability: Floats, tokens: int, top_k: int, rng: np.random.Generator) -> Int64:
    """Int64 `[D, E]`, `tokens * top_k` per device, at most `tokens` per expert: a token picks an expert once."""
    shares = probability / probability.sum(-1, keepdims=True)
    counts = rng.multinomial(tokens * top_k, shares).astype(np.int64)
    while (over := np.maximum(counts - tokens, 0).sum(axis=1)).any():
        counts = np.minimum(counts, tokens)
        room = np.where(counts < tokens, shares + 1e-9, 0)
        counts += rng.multinomial(over, room / room.sum(axis=1, keepdims=True))
    return counts


def _in(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"loads.{name}={value!r}: must be a number in [{low}, {high}]")
