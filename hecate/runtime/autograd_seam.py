"""The private torch.autograd calls of this package, and why there is no public way.

- Reductions that run behind backward must end before `backward()` returns: only `queue_callback` runs code then.
- A forward pass inside a backward pass is a recomputation (activation checkpointing): only the current graph task says
  so. FSDP2 uses the same two calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable

__all__ = ["at_end_of_backward", "in_backward"]


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the backward pass that is running now has computed all gradients."""
    Variable._execution_engine.queue_callback(callback)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1
