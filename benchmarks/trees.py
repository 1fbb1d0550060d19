"""Copies of the package as of two commits, and processes that import it from one of them: to time old beside new."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from hecate import _native

__all__ = ["ROOT", "checkout", "output_of", "working_tree"]

ROOT = Path(__file__).parents[1]

RUN = """
import runpy, sys
tree, program, *sys.argv[1:] = sys.argv[1:]
# An editable installation of the package comes before all paths.
sys.meta_path = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, tree)
import hecate
assert hecate.__file__.startswith(tree), f"hecate was imported from {hecate.__file__}, must be from {tree}"
runpy.run_path(program, run_name="__main__")
"""


def working_tree(folder: Path) -> Path:
    """Copy the package as it is now to `folder`, with the native extension that is installed."""
    shutil.copytree(ROOT / "hecate", folder / "hecate", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(_native.__file__, folder / "hecate")
    return folder


def checkout(commit: str, folder: Path, native: Path | None = None) -> Path:
    """Write the package as of `commit` to `folder`, with its native extension; `native` is one built before."""
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    shutil.copy(_built(folder) if native is None else native, folder / "hecate" / Path(_native.__file__).name)
    return folder


def _built(folder: Path) -> Path:
    made = folder / "build"
    configure = ["cmake", "-S", str(folder), "-B", str(made), f"-DPython_EXECUTABLE={sys.executable}"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in ([*configure, "-DCMAKE_BUILD_TYPE=Release"], ["cmake", "--build", str(made)]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return next(made.glob("_native*.so"))


def output_of(tree: Path, program: Path, arguments: Sequence[str]) -> str:
    """What `program` prints, in a process of one thread that imports the package from `tree`."""
    command = [sys.executable, "-c", RUN, str(tree), str(program), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
