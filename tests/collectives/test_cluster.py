"""The emulated cluster sets torchrun's variables, carries traffic between its nodes, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = 77
READY = "ready"


def start(*command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "benchmarks.cluster", "--nodes", "2", "--devices-per-node", "2", *options]
    return subprocess.Popen([*words, "--", *command], cwd=ROOT, text=True, stdout=-1, stderr=-1)


def finish(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = launcher.communicate(timeout=60)
    if launcher.returncode == SKIPPED:
        pytest.skip(err.strip())
    return launcher.returncode, out, err


def left_behind(launcher: subprocess.Popen[str]) -> list[str]:
    """Namespaces, cgroups and processes of this launcher's cluster."""
    name = f"hecate-{launcher.pid}"
    spaces = [p.name for p in Path("/run/netns").glob(f"{name}*")]
    groups = [str(p) for p in (*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}"))]
    return spaces + groups


def wait_for_ready(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids that the four ranks print once they run."""
    assert launcher.stdout is not None
    pids = []
    for line in iter(launcher.stdout.readline, ""):
        if line.startswith(READY):
            pids.append(int(line.split()[1]))
        if len(pids) == 4:
            return pids
    finish(launcher)
    raise AssertionError("the ranks did not start")


def gone(pids: list[int]) -> bool:
    return not any(Path("/proc", str(pid)).exists() for pid in pids)


def until(condition: Callable[[], bool]) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return condition()


FOREVER = ("sh", "-c", f"echo {READY} $$; while :; do sleep 1; done")


def test_sets_torchruns_variables() -> None:
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    launcher = start("sh", "-c", "echo " + " ".join(f"${name}" for name in names), options=("--cpu", "0.5"))
    code, out, _ = finish(launcher)
    assert code == 0
    expected = [f"{r} {r % 2} {r // 2} 4 2 10.77.0.1" for r in range(4)]
    assert sorted(out.splitlines()) == expected
    assert left_behind(launcher) == []


TALK = """
import os, socket
rank = int(os.environ["RANK"])
if rank == 0:
    with socket.create_server(("10.77.0.1", 5000)) as server:
        print("from", server.accept()[1][0])
elif rank == 2:
    for _ in range(100):
        try:
            socket.create_connection(("10.77.0.1", 5000)).close()
            break
        except ConnectionRefusedError:
            __import__("time").sleep(0.05)
"""


def test_nodes_reach_each_other() -> None:
    code, out, err = finish(start(sys.executable, "-S", "-c", TALK))
    assert (code, out.strip()) == (0, "from 10.77.0.2"), err


def test_code_of_the_rank_that_failed() -> None:
    launcher = start("sh", "-c", '[ "$RANK" != 3 ] || exit 5; sleep 100', options=("--grace", "0.2"))
    code, _, _ = finish(launcher)
    assert code == 5
    assert left_behind(launcher) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals) -> None:
    launcher = start(*FOREVER, options=("--cpu", "0.5"))
    pids = wait_for_ready(launcher)
    launcher.send_signal(number)
    code, _, _ = finish(launcher)
    assert code == 128 + number
    assert gone(pids)
    assert left_behind(launcher) == []


def test_next_launcher_removes_what_a_killed_one_left() -> None:
    killed = start(*FOREVER, options=("--cpu", "0.5"))
    pids = wait_for_ready(killed)
    killed.kill()
    killed.wait()
    assert left_behind(killed)
    finish(start("true"))
    assert left_behind(killed) == []
    assert until(lambda: gone(pids))


def test_says_in_one_line_what_is_missing() -> None:
    command = [sys.executable, "-m", "benchmarks.cluster", "--", "true"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "/nonexistent"}, capture_output=True, text=True, check=False)
    assert done.returncode == SKIPPED
    assert len(done.stderr.splitlines()) == 1
    assert "lacks" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nodes", "0"), "--nodes 0: must be at least 1"),
        (("--cpu", "0.1"), "--cpu 0.1: must be at least 0.2"),
    ],
)
def test_bad_options_are_named(options: tuple[str, ...], message: str) -> None:
    launcher = start("true", options=options)
    code, _, err = finish(launcher)
    assert code == 2
    assert message in err


def test_needs_a_command() -> None:
    code, _, err = finish(start())
    assert code == 2
    assert "no command" in err
