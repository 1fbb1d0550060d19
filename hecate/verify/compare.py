"""Finds the largest relative error of each quantity, and its place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hecate.adapters.base import find_experts
from hecate.verify.report import Row

__all__ = ["Comparison", "Step", "parts", "relative_error"]

SMALL = 1e-2
"""A tensor whose values are smaller than this share of all tensors' is compared with that share: some gradients, such
as that of an attention's key bias, are zero but for rounding."""


@dataclass(frozen=True)
class Step:
    """The results of one optimizer step of a run.

    Attributes:
        loss: mean over ranks and micro-batches.
        norm: norm of all gradients, before clipping.
        gradients: (original name, whole tensor on the CPU) of every trained parameter.
        loads: per MoE layer, int64 `[E]`, (token, expert) pairs of all ranks and micro-batches.
        evaluation: mean loss over ranks without training, after the step; None if there was no evaluation.
    """

    loss: float
    norm: float
    gradients: Mapping[str, Tensor]
    loads: Sequence[NDArray[np.int64]]
    evaluation: float | None


def parts(model: nn.Module) -> dict[str, str]:
    """Name of each parameter of a plain model -> "dense", "router" or "experts <kind>".

    A router's parameter stands beside the experts module and has as many rows as there are experts.
    """
    names = dict.fromkeys((name for name, _ in model.named_parameters()), "dense")
    modules = {module: name for name, module in model.named_modules()}
    for found in find_experts(model):
        prefix = f"{modules[found.parent]}." if modules[found.parent] else ""
        for name, parameter in found.parent.named_parameters(prefix=prefix.removesuffix(".")):
            inside = name.startswith(f"{found.spec.name}.")
            if not inside and parameter.ndim and parameter.shape[0] == found.spec.num_experts:
                names[name] = "router"
        names |= {found.spec.name_of(w.kind): f"experts {w.kind}" for w in found.spec.weights}
    return names


class Comparison:
    """The largest error of each quantity under one way of training.

    Args:
        way: name of the way of training.
        parts: original name of each parameter -> its part, see `parts`.
        tolerance: largest error that counts as equal, except for what is compared bit by bit.
    """

    def __init__(self, way: str, parts: Mapping[str, str], tolerance: float) -> None:
        self._way, self._parts, self._tolerance = way, parts, tolerance
        self._rows: dict[str, Row] = {}

    @property
    def rows(self) -> tuple[Row, ...]:
        """One row per quantity, in the order in which quantities were first compared."""
        return tuple(self._rows.values())

    def step(self, number: int, actual: Step, expected: Step) -> None:
        """Compare one optimizer step."""
        where = f"step {number}"
        self._number("loss", where, actual.loss, expected.loss)
        self.tensors("gradient", where, actual.gradients, expected.gradients, by_part=True)
        self._number("norm", where, actual.norm, expected.norm)
        for layer, (loads, plain) in enumerate(zip(actual.loads, expected.loads, strict=True)):
            wrong = int(np.abs(loads - plain).sum())
            self._keep("loads", wrong / max(1, int(plain.sum())), f"{where}, MoE layer {layer}", 0.0)
        if actual.evaluation is not None and expected.evaluation is not None:
            self._number("evaluation loss", where, actual.evaluation, expected.evaluation)

    def tensors(
        self,
        quantity: str,
        where: str,
        actual: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        by_part: bool = False,
    ) -> None:
        """Compare tensors by name; with `by_part` each part of the model is a quantity of its own.

        If a name is only on one side, the error is infinite.
        """
        smallest = SMALL * _mean_square(expected.values()) ** 0.5
        for name in {**expected, **actual}:
            part = self._parts.get(name, "dense")
            kept_as = f"{quantity} {part}" if by_part else quantity
            if name not in actual or name not in expected:
                side = "the plain model" if name in expected else "Hecate"
                self._keep(kept_as, math.inf, f"{where}, {name}, which only {side} has")
                continue
            error, row = relative_error(actual[name], expected[name], smallest)
            expert = f", expert {row}" if part.startswith("experts") else ""
            self._keep(kept_as, error, f"{where}, {name}{expert}")

    def bits(self, quantity: str, where: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Compare tensors that must be the same bit by bit."""
        for name in {**expected, **actual}:
            both = name in actual and name in expected
            error = relative_error(actual[name], expected[name], 0.0)[0] if both else math.inf
            self._keep(quantity, error, f"{where}, {name}", 0.0)

    def _number(self, quantity: str, where: str, actual: float, expected: float) -> None:
        difference = abs(actual - expected)
        self._keep(quantity, difference / abs(expected) if difference and expected else difference, where)

    def _keep(self, quantity: str, error: float, where: str, tolerance: float | None = None) -> None:
        row = Row(self._way, quantity, error, where, self._tolerance if tolerance is None else tolerance)
        old = self._rows.get(quantity)
        if old is None or not (math.isnan(old.error) or error <= old.error):  # NaN is the largest, the first one stays
            self._rows[quantity] = row


def _mean_square(tensors: Iterable[Tensor]) -> float:
    squares, numbers = 0.0, 0
    for tensor in tensors:
        squares += float(tensor.double().square().sum())
        numbers += tensor.numel()
    return squares / max(1, numbers)


def relative_error(actual: Tensor, expected: Tensor, smallest: float) -> tuple[float, int]:
    """Norm of the difference divided by that of `expected`, and the index in the first dimension that differs most.

    Args:
        actual: a tensor.
        expected: the tensor it should equal; if shapes differ, the error is infinite.
        smallest: lower bound of the root mean square that `expected` is taken to have.
    """
    if actual.shape != expected.shape:
        return math.inf, 0
    if torch.equal(actual, expected):  # infinities too
        return 0.0, 0
    actual, expected = actual.double(), expected.double()
    difference = actual - expected
    norm = float(difference.norm())
    scale = max(float(expected.norm()), smallest * expected.numel() ** 0.5)
    rows = difference.reshape(difference.shape[0] if difference.ndim else 1, -1).norm(dim=1)
    return norm / scale if scale else math.inf, int(rows.argmax())
