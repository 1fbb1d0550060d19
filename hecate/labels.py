"""Names of what the runtime does, as torch.profiler (and NVTX through it) shows them."""

from __future__ import annotations

from typing import Literal

from torch.profiler import record_function

__all__ = ["Verb", "label"]

Verb = Literal["gather", "plan", "count", "dispatch", "experts", "shared", "combine", "reduce", "average", "reshard"]
"""The same few verbs as in code and docs/stats.md."""


def label(verb: Verb, layer: str = "") -> record_function:
    """A context that profiles show as e.g. "hecate::gather blocks.3.moe.experts"."""
    return record_function(f"hecate::{verb} {layer}")
