"""The source text of the kernels: csrc/cuda, or its copy in the installed package."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

__all__ = ["SOURCES", "folder", "read"]

SOURCES = ("activation", "combine", "permute", "quota", "sort", "stack")
"""Files with kernels, without the suffix .cu."""
_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)


def folder() -> Path:
    """The folder of the kernels' sources: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[2]
    for found in (package / "csrc" / "cuda", package.parent / "csrc" / "cuda"):
        if (found / "hd.cuh").is_file():
            return found
    raise FileNotFoundError(f"no csrc/cuda/hd.cuh in {package} or {package.parent}: the installation is incomplete")


@lru_cache
def read(source: str) -> str:
    """The text of `source`.cu with the headers it includes in it, each once.

    One text, because CuPy's cache on disk recognizes a program by its text and would miss a change in a header.
    """
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder() / name).read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: expand(match[1]), text)

    return expand(f"{source}.cu")
