"""`python -m tests.dry_run`: every case on every rank that is looked at; exits with 1 if anything is wrong.

Needs a CUDA build of torch in the environment that it runs in, and a C++ compiler, but no GPU: `make cuda-dry-run`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from tests.dry_run.cases import CASES, ranks_of
from tests.dry_run.order import faults_in_order
from tests.dry_run.records import Case, Fault, Outcome
from tests.dry_run.worker import run, unnoticed

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases whose description contains all of the given words; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.dry_run", description=__doc__)
    parser.add_argument("words", nargs="*", help="run only cases whose description contains all of these")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if all(word in str(case) for word in options.words)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LD_PRELOAD"] = str(build(Path(folder)))  # for the processes started below
        os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            if missed := pool.submit(unnoticed).result():
                print("The fake device does not report what it must:", *missed, sep="\n  ")
                return 1
            outcomes = {case: {rank: pool.submit(run, case, rank) for rank in ranks_of(case)} for case in cases}
            wrong = [case for case in cases if not report(case, outcomes[case])]
    print(f"{len(cases) - len(wrong)} of {len(cases)} cases are in order")
    return 1 if wrong or not cases else 0


def build(folder: Path) -> Path:
    """Compile the fake CUDA runtime with the headers that come with torch's CUDA build (in triton)."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise SystemExit(f"{sys.executable} has no CUDA build of torch (no triton); run it by `make cuda-dry-run`")
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    library = folder / "libfake_cuda.so"
    # torch opens libcuda.so.1 by name and finds this one, which is loaded already.
    compiler = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-O1", "-std=c++17", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*compiler, f"-I{headers}", str(SOURCE), "-o", str(library)], check=True)
    return library


def report(case: Case, pending: dict[int, Future[Outcome | str]]) -> bool:
    """Print what a case gave; returns whether all is in order."""
    start = time.perf_counter()
    found = {rank: future.result() for rank, future in pending.items()}
    raised = {rank: outcome for rank, outcome in found.items() if isinstance(outcome, str)}
    done = {rank: outcome for rank, outcome in found.items() if isinstance(outcome, Outcome)}
    faults: dict[Fault, list[int]] = {}
    for rank, outcome in done.items():
        for fault in outcome.faults:
            faults.setdefault(fault, []).append(rank)
    order = [] if raised else faults_in_order({rank: outcome.log for rank, outcome in done.items()})
    launches = sum(len(outcome.log) for outcome in done.values())
    copies = max((outcome.copies for outcome in done.values()), default=0)
    good = not (raised or faults or order)
    print(
        f"{'ok' if good else 'WRONG':5} {case}: ranks {sorted(found)}, {launches} launches, {copies} copies, "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )
    for fault, ranks in faults.items():
        print(f"      {fault.kind}: {fault.what}\n        at {fault.where}\n        on ranks {ranks}")
    for line in order:
        print(f"      order: {line}")
    for rank, text in list(raised.items())[:1]:
        print(f"      rank {rank} raised (and {len(raised) - 1} more):\n{text}")
    return good


if __name__ == "__main__":
    sys.exit(main())
