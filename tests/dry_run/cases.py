"""The cases, and which of their ranks are run."""

from __future__ import annotations

from tests.dry_run.records import Case

__all__ = ["CASES", "ranks_of"]

SAMPLE = (0, 1, 7, 8, 33, 63)
"""Ranks of 64 that are run: first and last of nodes of 8 (or 32), and one in the middle."""

ONE = [Case(model, "balanced", again, 1, 1) for model in ("gpt", "qwen3_moe") for again in (False, True)]
ONE += [Case("qwen3_moe", "balanced", False, 1, 1, splits="device")]
EIGHT = [
    Case("gpt", "ep", False, 8, 8),
    Case("gpt", "hecate", False, 8, 8),
    Case("gpt", "hecate", False, 8, 8, kernels="torch"),
    Case("gpt", "hecate", True, 8, 4),
    Case("gpt recomputed", "balanced", True, 8, 4),
    Case("gpt with 6 experts per token", "balanced", False, 8, 4, by_node=True),
    Case("gpt", "balanced", False, 8, 8, dense="replicate"),
    Case("gpt", "balanced", False, 8, 4, replicas=2),
    Case("qwen3_moe", "balanced", False, 8, 8),
    Case("qwen3_moe", "ep", True, 8, 4),
    Case("qwen3_moe", "balanced", True, 8, 4, kernels="torch"),
    Case("gpt", "hecate", False, 8, 8, halves=True),
    Case("gpt recomputed", "balanced", True, 8, 4, halves=True),
    Case("qwen3_moe", "balanced", False, 8, 4, kernels="torch", halves=True),
    Case("gpt", "balanced", False, 8, 8, splits="device"),
    Case("qwen3_moe", "ep", True, 8, 4, splits="device"),
]
MANY = [
    Case("gpt", "ep", False, 64, 8),
    Case("gpt", "hecate", True, 64, 8),
    Case("gpt with 6 experts per token", "balanced", True, 64, 32, by_node=True),
    Case("qwen3_moe", "balanced", True, 64, 8),
    Case("qwen3_moe", "hecate", False, 64, 8),
    Case("qwen3_moe", "balanced", True, 64, 8, halves=True),
]
CASES = [*ONE, *EIGHT, *MANY]


def ranks_of(case: Case) -> tuple[int, ...]:
    """All ranks of a small job; some of a large one, where messages to and from the others are not checked."""
    return tuple(range(case.world)) if case.world <= 8 else SAMPLE
