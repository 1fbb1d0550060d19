"""Runs a program of several processes."""

from __future__ import annotations

from tests import forked


def run(module: str, *arguments: str, processes: int = 2) -> str:
    """Output of `python -m module arguments`; of all processes, rank 0 first, where there is more than one."""
    words = ("-m", module, *arguments)
    done = forked.run_ranks(*words, ranks=processes) if processes > 1 else [forked.run(*words)]
    assert [program.returncode for program in done] == [0] * processes, [program.stderr for program in done]
    return "".join(program.stdout for program in done)
