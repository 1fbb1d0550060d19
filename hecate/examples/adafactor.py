"""Adafactor on sharded parameters: `torchrun --nproc-per-node 2 -m hecate.examples.adafactor`.

The Adafactor of torch and of transformers use norms of whole tensors; if a tensor is sharded they fail, or use only the
part on this rank. Here norms are per matrix of a stack, so that an expert's update does not depend on the rank it is on
or on the other experts in its pool. Sums over a sharded dimension are left to DTensor. Adafactor: Shazeer and Stern,
arXiv 1804.04235.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from hecate.examples.optimizers import EachParameter, train_tiny

__all__ = ["ShardedAdafactor"]


class ShardedAdafactor(EachParameter):
    """`torch.optim.Adafactor`, with scale and clipping computed separately for each matrix of a stack.

    Args:
        params: plain tensors or DTensors, `[..., outputs, inputs]` or vectors.
        lr: learning rate, relative to the root mean square of the weights.
        beta2_decay: the newest squared gradient enters the running mean with weight step ** beta2_decay.
        eps: lower bounds of the gradient's magnitude (None: the dtype's epsilon) and of the weights' root mean square.
        clip: upper bound of an update's root mean square.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "clip": clip, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter in place."""
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        least, least_scale = group["eps"]
        least = torch.finfo(parameter.dtype).eps if least is None else least
        share = state["step"] ** group["beta2_decay"]
        update = _variance(state, gradient, share, least).clamp(min=least**2).rsqrt() * gradient
        matrix = (-2, -1) if parameter.ndim > 1 else (-1,)
        scale = _mean(parameter.square(), matrix).sqrt().clamp(min=least_scale)
        size = (_mean(update.square(), matrix).sqrt() / group["clip"]).clamp(min=1.0)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update * (scale / size * min(group["lr"], state["step"] ** -0.5)))


def _variance(state: dict[str, Any], gradient: Tensor, share: float, least: float) -> Tensor:
    """The running mean of the squared gradient; for matrices, factored into row and column means."""
    if gradient.ndim == 1:
        return _running(state, "variance", gradient.square(), share)
    rows = _running(state, "row_var", _mean(gradient.square(), (-1,)), share)
    columns = _running(state, "col_var", _mean(gradient.square(), (-2,)), share)
    return rows * columns / _mean(rows, (-2,)).clamp(min=least)


def _running(state: dict[str, Any], key: str, value: Tensor, share: float) -> Tensor:
    if key not in state:
        state[key] = torch.zeros_like(value)
    running: Tensor = state[key].lerp_(value, share)
    return running


def _mean(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean over `dims`, which keep size 1; all-reduced over the ranks if a reduced dimension is sharded."""
    mean = tensor.mean(dims, keepdim=True)
    if isinstance(mean, DTensor):
        return mean.redistribute(placements=[Replicate() if p.is_partial() else p for p in mean.placements])
    return mean


def main() -> None:
    """Train a tiny random model."""
    train_tiny(lambda model: [ShardedAdafactor(model.parameters())])


if __name__ == "__main__":
    main()
