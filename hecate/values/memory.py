"""Measures the memory of parameters, gradients and optimizer state on this device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.values.local import local_tensor

__all__ = ["PeakMemory"]

STEPS_TO_MEASURE = 3
"""Steps after the start or after loading in which memory is measured: by then all tensors have their final size."""


class PeakMemory:
    """The largest measured size of parameters, optimizer state and gradients on this device.

    Args:
        model: the model.
        copies: parameters that are not the model's, but have gradients too.

    Attributes:
        peaks: bytes of "owned" (parameters), "optimizer" and "gradients".
    """

    def __init__(self, model: nn.Module, copies: Sequence[Tensor] = ()) -> None:
        self.peaks = {"owned": 0, "optimizer": 0, "gradients": 0}
        self._model = model
        self._copies = tuple(copies)
        self._steps_left = STEPS_TO_MEASURE

    def after_step(self, optimizers: Iterable[Optimizer]) -> None:
        """Measure in the first steps; call it before the step's gradients are dropped."""
        if self._steps_left:
            self._steps_left -= 1
            self._measure(optimizers)

    def after_loading(self, optimizers: Iterable[Optimizer]) -> None:
        """Measure now, because no step may follow, and in the next steps."""
        self._steps_left = STEPS_TO_MEASURE
        self._measure(optimizers)

    def _measure(self, optimizers: Iterable[Optimizer]) -> None:
        parameters: list[Tensor] = list(self._model.parameters())
        state: list[object] = [v for o in optimizers for values in o.state.values() for v in values.values()]
        found: dict[str, list[Tensor]] = {
            "owned": parameters,
            "optimizer": [v for v in state if isinstance(v, Tensor)],
            "gradients": [p.grad for p in (*parameters, *self._copies) if p.grad is not None],
        }
        self.peaks = {kind: max(peak, _num_bytes(found[kind])) for kind, peak in self.peaks.items()}


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes on this device."""
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))
