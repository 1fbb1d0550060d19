"""The source text of the kernels: csrc/cuda, or its copy in the installed package."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from hecate.carried import carried

__all__ = ["SOURCES", "folder", "read"]

SOURCES = ("activation", "combine", "permute", "quota", "sort", "stack", "symmetric")
"""Files with kernels, without the suffix .cu."""
_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)


def folder() -> Path:
    """The folder of the kernels' sources: inside the installed package, or beside it in a source tree."""
    return carried("csrc/cuda/hd.cuh").parent


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
