"""Programs forked from a process with all imports end and are signalled as those of an interpreter of their own."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.forked import Program, run

SAYS = """
import atexit, os, sys, weakref
class Held: pass
held = Held()
atexit.register(lambda: print("at exit", flush=True))
weakref.finalize(held, print, "finalized", flush=True)
print(sys.argv[1:], os.environ.get("MINE"), os.getcwd(), __name__, flush=True)
print("problem", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('why')", 1, "why"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), 2)", -signal.SIGINT, "KeyboardInterrupt"),
    ],
)
def test_they_end_as_scripts_do(tmp_path: Path, end: str, code: int, error: str) -> None:
    done = run("-c", SAYS + end, "a", cwd=tmp_path, env={**os.environ, "MINE": "yes"})
    assert done.returncode == code
    lines = done.stdout.splitlines()
    assert lines[0] == f"['a'] yes {tmp_path} __main__"
    assert sorted(lines[1:]) == ["at exit", "finalized"]
    assert done.stderr.startswith("problem\n")
    assert done.stderr.splitlines()[-1] == (error or "problem")


def test_their_modules_are_found_where_they_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    assert run("-m", "mine", "x", cwd=tmp_path).stdout == "__main__ ['x']\n"


def test_they_can_be_killed_and_waited_for() -> None:
    program = Program(("-c", "import time; print('ready', flush=True); time.sleep(600)"))
    while program.output() != "ready\n":
        assert program.poll() is None
    assert os.getsid(program.pid) == program.pid
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.01)
    program.kill()
    assert program.wait(60) == -signal.SIGKILL
    assert program.poll() == -signal.SIGKILL
