"""Says when a later micro-batch of a step may use casts of owned rows that an earlier one has made.

Casts are kept for the micro-batches over which gradients accumulate. There is no sure sign of a write to a weight.
`_version` counts in-place operations on the parameter and on its local tensor, but no write through `.data` or another
tensor with the same memory. For a DTensor it counts neither `torch._foreach_*` operations nor fused optimizers.
So a cast serves a forward pass only if all of this holds:

- an optimizer of torch's trains the model, whose steps the engine sees, and none has stepped since;
- no pass without gradients ran in between (evaluation, for which averages of weights may have been swapped in and out);
- no parameter's `_version`, memory or owner has changed (loading, re-sharding, `p.copy_()` under `torch.no_grad()`);
- the gradients that the last backward pass has left are still there, and nobody has written to them: whoever updates
  weights without an optimizer clears them.

A write that none of these shows is one that `_version` does not count, between two micro-batches of one step, which
leaves the gradients as they are. HECATE_DEBUG=1 finds it; `p.add_()` and the like on the parameter are always seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, UntypedStorage

from hecate.runtime.experts.pool import ExpertPool
from hecate.values.local import local_tensor

__all__ = ["CastStamp", "CastWatch"]


@dataclass(frozen=True, eq=False)
class CastStamp:
    """What a pool's weights were like when they were cast: see `CastWatch.holds`.

    Attributes:
        period: number of the period in which casts may be used again.
        owners: `ExpertPool.owners`.
        written: versions and memory of the parameters.
    """

    period: int
    owners: tuple[NDArray[np.int64], ...]
    written: tuple[tuple[int, int, int], ...]


class CastWatch:
    """Watches the weights and gradients of one pool; see the module.

    Args:
        pool: the pool.
    """

    def __init__(self, pool: ExpertPool) -> None:
        self._pool = pool
        self._period = 0
        # Gradients after the last backward pass. By storage, because torch cannot swap a tensor with weak references.
        self._left: list[tuple[weakref.ref[UntypedStorage], int, int]] = []

    def begin_forward(self, accumulates: bool) -> None:
        """A forward pass begins.

        Args:
            accumulates: whether a backward pass may add its gradients to those of the step under way.
        """
        if not (accumulates and self._left and self._gradients_are_left()):
            self.forget()

    def end_backward(self) -> None:
        """A backward pass has ended, and its gradients are complete."""
        self._left = [(weakref.ref(_storage(g)), *_versions(g)) for g in self._gradients()]

    def forget(self) -> None:
        """Casts that were made until now are not used again."""
        self._period += 1
        self._left = []

    def stamp(self) -> CastStamp:
        """The stamp of casts that are made now."""
        return CastStamp(self._period, self._pool.owners, self._written())

    def holds(self, stamp: CastStamp) -> bool:
        """Whether casts with this stamp may be used now."""
        same_owners = stamp.owners is self._pool.owners
        return stamp.period == self._period and same_owners and stamp.written == self._written()

    def _written(self) -> tuple[tuple[int, int, int], ...]:
        pairs = ((p, local_tensor(p)) for p in self._pool.parameters.values())
        return tuple((p._version, local._version, local.data_ptr()) for p, local in pairs)

    def _gradients(self) -> list[Tensor]:
        gradients = [p.grad for p in self._pool.parameters.values()]
        return [g for g in (*gradients, *self._pool.unreduced.values()) if g is not None]

    def _gradients_are_left(self) -> bool:
        now = self._gradients()
        same = (
            _storage(g) is left() and _versions(g) == tuple(v) for g, (left, *v) in zip(now, self._left, strict=False)
        )
        return len(now) == len(self._left) and all(same)


def _storage(tensor: Tensor) -> UntypedStorage:
    return local_tensor(tensor).untyped_storage()


def _versions(tensor: Tensor) -> tuple[int, int]:
    """Of the tensor itself, which counts operations on it, and of its local tensor."""
    return tensor._version, local_tensor(tensor)._version
