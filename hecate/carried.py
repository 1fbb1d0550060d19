"""Finds files of the source tree that the wheel carries inside the package."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["carried", "main"]


def carried(path: str) -> Path:
    """Where a file such as "conf/config.yaml" is: inside the installed package, or beside it in a source tree.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package = Path(__file__).resolve().parent
    for found in (package / path, package.parent / path):
        if found.is_file():
            return found
    raise FileNotFoundError(f"no {path} in {package} or {package.parent}: the installation is incomplete")


def main() -> None:
    """`hecate-path FILE`: print where a carried file is; exit with 2 if there is none."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: hecate-path FILE, e.g. launch/slurm.sbatch, launch/torchrun.sh, conf/config.yaml")
    try:
        print(carried(sys.argv[1]))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
