"""Skews: which experts the tokens of a step choose, the same for all systems that are compared.

    own              the router's own choice, as it learns
    none             every expert equally often: nothing to balance
    zipf:1.2         in proportion to rank**-1.2, hot experts on different devices
    zipf:1.2:beside  the same, hot experts side by side: the first device owns the hottest
    hot:0.3          the first choice of 30 % of the tokens is one expert
    drift            as zipf:1.0, and every expert's popularity walks from step to step
    trace:FILE       in proportion to loads that were recorded with `trace=true` (hecate.loads.trace)

A token's choice depends on step, layer and rank alone, so that a recomputation chooses the same experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hecate.loads.trace import read_trace

__all__ = ["KINDS", "PLACE_OF_CHOICE", "Router", "Skew", "parse_skew"]

KINDS = ("own", "none", "zipf:EXPONENT", "zipf:EXPONENT:beside", "hot:SHARE", "drift", "trace:FILE")

PLACE_OF_CHOICE = {"MixtralTopKRouter": 2, "TokenChoiceTopKRouter": 1}
"""Where the chosen experts stand in the tuple that a router returns: transformers' and that of DeepSpeed's AutoEP.

Hecate's `TopKGate` returns a named tuple with a field `expert_index`."""


class Skew(ABC):
    """What replaces the choice of a router."""

    @abstractmethod
    def choose(self, tokens: int, experts: int, top_k: int, seed: tuple[int, int, int]) -> Tensor | None:
        """Int64 `[tokens, top_k]`, different experts per token; None leaves the router its own choice.

        Args:
            tokens: tokens of this rank.
            experts: experts of the layer.
            top_k: experts per token.
            seed: step, layer and rank.
        """


class Own(Skew):
    """The router's own choice."""

    def choose(self, tokens: int, experts: int, top_k: int, seed: tuple[int, int, int]) -> None:
        return None


class Even(Skew):
    """Every expert equally often."""

    def choose(self, tokens: int, experts: int, top_k: int, seed: tuple[int, int, int]) -> Tensor:
        return torch.arange(tokens * top_k).view(tokens, top_k) % experts


class Drawn(Skew):
    """Experts drawn without replacement in proportion to exp(logit), by Gumbel noise."""

    @abstractmethod
    def logits(self, experts: int, step: int, layer: int, rank: int) -> Tensor:
        """Float `[experts]`."""

    def choose(self, tokens: int, experts: int, top_k: int, seed: tuple[int, int, int]) -> Tensor:
        step, layer, rank = seed
        generator = torch.Generator().manual_seed((step * 1_000 + layer) * 10_000 + rank)
        noise = -torch.empty(tokens, experts).exponential_(generator=generator).log()
        return (self.logits(experts, step, layer, rank) + noise).topk(top_k, dim=1).indices


@dataclass(frozen=True)
class Zipf(Drawn):
    """Popularity rank**-exponent; ranks are shuffled per layer, or follow the numbers of the experts if `beside`."""

    exponent: float
    beside: bool = False

    def logits(self, experts: int, step: int, layer: int, rank: int) -> Tensor:
        ranks = torch.arange(experts) if self.beside else _shuffled(experts, layer)
        return -self.exponent * (ranks + 1).log()


@dataclass(frozen=True)
class Hot(Drawn):
    """One expert per layer is the first choice of `share` of the tokens; the others are equally popular."""

    share: float

    def logits(self, experts: int, step: int, layer: int, rank: int) -> Tensor:
        found = torch.zeros(experts)
        found[_shuffled(experts, layer)[0]] = math.log(self.share * (experts - 1) / (1 - self.share))
        return found


class Drift(Drawn):
    """Zipf 1.0, plus a walk of 0.1 per step around it with standard deviation 0.6, and noise of 0.15 per step."""

    RATE, STD, NOISE = 0.1, 0.6, 0.15

    def __init__(self) -> None:
        self._walks: dict[int, tuple[int, Tensor]] = {}  # layer -> step and walk

    def logits(self, experts: int, step: int, layer: int, rank: int) -> Tensor:
        at, walk = self._walks.get(layer, (-1, torch.zeros(experts)))
        if at > step:  # a new run has begun
            at, walk = -1, torch.zeros(experts)
        for number in range(at + 1, step + 1):
            walk = math.sqrt(1 - self.RATE**2) * walk + self.RATE * self.STD * _normal(experts, number, layer, 0)
        self._walks[layer] = (step, walk)
        return Zipf(1.0).logits(experts, step, layer, rank) + walk + self.NOISE * _normal(experts, step, layer, 1)


class Recorded(Drawn):
    """Popularity as in a trace, per step and layer; step after step, from the beginning again after the last.

    With as many devices as were recorded each rank has the popularity of its device, otherwise that of all of them.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._trace = read_trace(path)

    def logits(self, experts: int, step: int, layer: int, rank: int) -> Tensor:
        counts = self._trace.layers[layer % len(self._trace.layers)]
        if counts.shape[2] != experts:
            raise ValueError(f"skew trace:{self._path}: has {counts.shape[2]} experts, the model {experts}")
        now = counts[step % len(counts)]
        own = now[rank] if _world_size() == len(now) else now.sum(axis=0)
        return torch.from_numpy(own).double().add(0.5).log().float()  # 0.5: an expert without tokens is possible too


def parse_skew(text: str) -> Skew:
    """The skew that `text` names; ValueError lists the valid ones."""
    name, *values = text.split(":")
    try:
        match name, values:
            case ("own", []):
                return Own()
            case ("none", []):
                return Even()
            case ("drift", []):
                return Drift()
            case ("zipf", [exponent]):
                return Zipf(_number(exponent, 0, math.inf))
            case ("zipf", [exponent, "beside"]):
                return Zipf(_number(exponent, 0, math.inf), beside=True)
            case ("hot", [share]):
                return Hot(_number(share, 0, 1))
            case ("trace", [_, *_]) if values != [""]:
                return Recorded(text.removeprefix("trace:"))
    except OSError as error:
        raise ValueError(f"skew {text!r}: {error}") from error
    raise ValueError(f"skew {text!r}: must be one of {', '.join(KINDS)}")


def _number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least < value < most:
        raise ValueError(f"skew: {text!r} must be a number > {least:g} and < {most:g}")
    return value


def _shuffled(experts: int, layer: int) -> Tensor:
    return torch.randperm(experts, generator=torch.Generator().manual_seed(layer))


def _normal(experts: int, step: int, layer: int, which: int) -> Tensor:
    return torch.randn(experts, generator=torch.Generator().manual_seed((step * 1_000 + layer) * 2 + which))


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class Router:
    """Replaces the choices of all gates of a model. Weights of the chosen experts stay those of the gate's own choice.

    Attributes:
        skew: what chooses; may be changed between steps.
        step: number of the step, from which the choice follows.
    """

    def __init__(self, gates: Iterable[nn.Module], rank: int) -> None:
        self.skew: Skew = Own()
        self.step = 0
        self._rank = rank
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def replaced(gate: nn.Module, inputs: object, output: Any) -> Any:
            named = hasattr(output, "_fields")
            at = output._fields.index("expert_index") if named else _place_of_choice(gate)
            own: Tensor = output[at]
            seed = (self.step, layer, self._rank)
            chosen = self.skew.choose(own.shape[0], int(gate.num_experts), own.shape[1], seed)  # type: ignore[arg-type]
            if chosen is None:
                return output
            values = [*output[:at], chosen.to(own.device), *output[at + 1 :]]
            return type(output)(*values) if named else tuple(values)

        return replaced


def _place_of_choice(gate: nn.Module) -> int:
    return next(PLACE_OF_CHOICE[c.__name__] for c in type(gate).__mro__ if c.__name__ in PLACE_OF_CHOICE)
