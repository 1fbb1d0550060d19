"""Names of what the runtime does, as torch.profiler (and NVTX through it) shows them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

from hecate.private_torch import named_range

__all__ = ["Verb", "label"]

Verb = Literal["gather", "plan", "count", "dispatch", "experts", "shared", "combine", "reduce", "average", "reshard"]
"""The same few verbs as in code and docs/stats.md."""


def label(verb: Verb, layer: str = "") -> AbstractContextManager[object]:
    """A context that profiles show as e.g. "hecate::gather blocks.3.moe.experts"."""
    return named_range(f"hecate::{verb} {layer}")
