"""Registers this package's ops with torch's dispatcher.

`torch.library.custom_op` would check in every call that no output aliases an input, which takes longer than launching
the kernels. Ops registered here are plain entries of the dispatcher; `torch.autograd.Function`s beside them
differentiate. A kernel for one kind of device, e.g. "CUDA", may be registered later and takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register"]

_LIBRARY = torch.library.Library("hecate", "FRAGMENT")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the op `hecate::<schema>`, which does not differentiate; returns it.

    Args:
        schema: e.g. "invert(Tensor order) -> Tensor". No output may alias an input.
        kernel: computes it on all devices by other ops.
        fake: the shapes and dtypes of the outputs, for torch.compile.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hecate::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hecate, name).default
