"""Finds the weights of one expert on the rank that owns it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hecate.values.local import local_tensor
from tests.checkpoint.runs import Run

EXPERT = 5


def row_of_expert(run: Run, layer: int, tensor: Callable[[torch.nn.Parameter], Tensor | None]) -> Tensor | None:
    """The part of `tensor(parameter)` that belongs to the expert, on its owner; None on other ranks."""
    pool = run.engine.pools[0]
    owned = pool.owned(layer).tolist()
    if EXPERT not in owned:
        return None
    value = tensor(pool.parameters["up"])
    assert value is not None
    return local_tensor(value)[pool.rows(layer)][owned.index(EXPERT)]
