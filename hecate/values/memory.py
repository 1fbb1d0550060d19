"""Measures the memory of parameters, gradients and optimizer state on this device."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from hecate.values.local import local_tensor

__all__ = ["PeakMemory"]


class PeakMemory:
    """The largest measured size of parameters, optimizer state and gradients on this device.

    Attributes:
        peaks: bytes of "owned" (parameters), "optimizer" and "gradients".
    """

    def __init__(self) -> None:
        self.peaks = {"owned": 0, "optimizer": 0, "gradients": 0}

    def measure(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Measure once; call it after a step, before its gradients are dropped."""
        parameters: list[Tensor] = list(model.parameters())
        state: list[object] = [v for o in optimizers for values in o.state.values() for v in values.values()]
        found: dict[str, list[Tensor]] = {
            "owned": parameters,
            "optimizer": [v for v in state if isinstance(v, Tensor)],
            "gradients": [p.grad for p in parameters if p.grad is not None],
        }
        self.peaks = {kind: max(peak, _num_bytes(found[kind])) for kind, peak in self.peaks.items()}


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes on this device."""
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))
