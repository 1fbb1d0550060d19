"""Compiles every kernel with nvcc, without a GPU, and prints what each takes of a processor.

`python -m hecate.ops.kernels.compile [--arch 80 90 100]`; `make kernels` runs it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from hecate.ops.kernels.source import SOURCES, folder

__all__ = ["ARCHITECTURES", "Resources", "compile_kernels", "main"]

ARCHITECTURES = (80, 90, 100)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Resources:
    """What a kernel takes.

    Attributes:
        kernel: name of the entry point.
        arch: 90 for sm_90.
        registers: per thread.
        spilled: bytes stored and loaded per thread because registers ran out.
        shared: bytes of shared memory that are fixed in the kernel; launches ask for more.
    """

    kernel: str
    arch: int
    registers: int
    spilled: int
    shared: int


def compile_kernels(archs: Sequence[int] = ARCHITECTURES, sources: Sequence[str] = SOURCES) -> list[Resources]:
    """Compile `sources` for all `archs`, in one call of nvcc.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: a file does not compile, with what nvcc says.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not in PATH: install the CUDA toolkit to compile the kernels without a GPU")
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    files = [str(folder() / f"{source}.cu") for source in sources]
    with tempfile.TemporaryDirectory() as cwd:
        command = [nvcc, "-std=c++17", f"-I{folder()}", *code, "-fatbin", "-Xptxas", "-v", *files]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr)


def parse(log: str) -> list[Resources]:
    """The resources that ptxas reports with -v, in the order of its report."""
    found, kernel, arch, spilled = [], "", 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            kernel, arch = match[1], int(match[2])
        elif match := _SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif match := _USED.search(line):
            found.append(Resources(kernel, arch, int(match[1]), spilled, int(match[2] or 0)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, a line per kernel; returns 1 if a kernel does not compile, 2 without nvcc."""
    parser = argparse.ArgumentParser(description="Compile Hecate's CUDA kernels with nvcc; needs no GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities")
    archs = parser.parse_args(arguments).arch
    try:
        found = compile_kernels(archs)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'kernel':28} {'sm':>4} {'registers':>9} {'spilled bytes':>13} {'fixed shared bytes':>18}")
    for r in sorted(found, key=lambda r: (r.kernel, r.arch)):
        print(f"{r.kernel:28} {r.arch:4} {r.registers:9} {r.spilled:13} {r.shared:18}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
