"""The emulated cluster sets torchrun's variables, carries traffic between its nodes, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cluster

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
    """Namespaces, links and cgroups of this launcher's cluster, including links that are wrongly outside of them."""
    name = f"hecate-{launcher.pid}"
    spaces = [p.name for p in Path("/run/netns").glob(f"{name}*")]
    groups = [str(p) for p in (*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}"))]
    return spaces + groups + [p.name for p in Path("/sys/class/net").glob("port*")]


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


def test_a_command_that_fails_under_a_quota() -> None:
    launcher = start("sh", "-c", f"echo {READY} $$; exit 3", options=("--cpu", "0.5"))
    pids = wait_for_ready(launcher)
    code, _, _ = finish(launcher)
    assert code == 3
    assert gone(pids)
    assert left_behind(launcher) == []


def test_a_killed_rank_under_a_quota() -> None:
    launcher = start(*FOREVER, options=("--cpu", "0.5", "--grace", "0.2"))
    pids = wait_for_ready(launcher)
    os.kill(pids[2], signal.SIGKILL)
    code, _, _ = finish(launcher)
    assert code == 128 + signal.SIGKILL
    assert gone(pids)
    assert left_behind(launcher) == []


GROUPS = """
import os
from pathlib import Path
from benchmarks.cluster import take_share
before = Path("/proc/self/cgroup").read_text()
take_share()
before, after = ("hecate-" in text for text in (before, Path("/proc/self/cgroup").read_text()))
os.write(1, f"inside {before} {after}\\n".encode())  # in one piece: both ranks write here
"""


def test_a_rank_that_is_late_takes_its_share_itself(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        with cluster.emulated(2, 1, 400, 0.5) as ranks:
            assert cluster.run([sys.executable, "-c", GROUPS], ranks, late=True) == 0
    except cluster.MissingError as missing:
        pytest.skip(str(missing))
    assert capfd.readouterr().out.split("\n")[:2] == ["inside False True"] * 2
    assert cluster.run([sys.executable, "-c", GROUPS], cluster.loopback(1, 1), late=True) == 0  # there is no share
    assert "inside False False" in capfd.readouterr().out


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


@pytest.fixture
def cgroup2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a fake cgroup tree of version 2, which the launcher uses in place of the machine's."""
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpuset cpu io memory\n")
    (root / "cgroup.subtree_control").write_text("")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"proc /proc proc rw 0 0\ncgroup2 {root} cgroup2 rw,nosuid 0 0\n")
    monkeypatch.setattr(cluster, "MOUNTS", mounts)
    return root


def test_quota_under_cgroup_version_2(cgroup2: Path) -> None:
    files = [cluster._make_cgroup(cluster._cgroup_root(), "hecate-0", rank, 0.22) for rank in range(2)]
    assert files == [cgroup2 / "hecate-0" / f"rank{rank}" / "cgroup.procs" for rank in range(2)]
    assert [(file.parent / "cpu.max").read_text() for file in files] == ["1100 5000"] * 2
    for folder in (cgroup2, cgroup2 / "hecate-0"):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu"


def test_removal_under_cgroup_version_2(cgroup2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that left its session and namespace is still in its cgroup."""
    stale = subprocess.Popen(["sleep", "100"], start_new_session=True)
    procs = cluster._make_cgroup(cgroup2, "hecate-0", 0, 0.5)
    procs.write_text(f"{stale.pid}\n")
    (cgroup2 / "hecate-0" / "cgroup.procs").write_text("")
    (cgroup2 / "another").mkdir()
    monkeypatch.setattr(Path, "rmdir", lambda folder: shutil.rmtree(folder))  # control files do not count there
    cluster._remove("hecate-0")
    assert stale.wait(10) == -signal.SIGKILL
    assert not (cgroup2 / "hecate-0").exists()
    assert (cgroup2 / "another").exists()


def test_leftovers_under_cgroup_version_2(cgroup2: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid in (ended.pid, os.getpid()):
        (cgroup2 / f"hecate-{pid}").mkdir()
    assert f"hecate-{ended.pid}" in cluster._leftovers()
    assert f"hecate-{os.getpid()}" not in cluster._leftovers()


def no_root(patch: pytest.MonkeyPatch, root: Path) -> None:
    patch.setattr(os, "geteuid", lambda: 1000)


def no_program(name: str) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def remove(patch: pytest.MonkeyPatch, root: Path) -> None:
        patch.setattr(shutil, "which", lambda program: None if program == name else f"/sbin/{program}")

    return remove


def no_controller(patch: pytest.MonkeyPatch, root: Path) -> None:
    (root / "cgroup.controllers").write_text("memory pids\n")


def no_mount(patch: pytest.MonkeyPatch, root: Path) -> None:
    cluster.MOUNTS.write_text("proc /proc proc rw 0 0\n")


def processes_in_the_root(patch: pytest.MonkeyPatch, root: Path) -> None:
    (root / "cgroup.subtree_control").unlink()
    (root / "cgroup.subtree_control").mkdir()  # an error to write to, also for root


@pytest.mark.parametrize(
    ("take_away", "message"),
    [
        (no_root, "root (network namespaces and cgroups)"),
        (no_program("ip"), "ip (package iproute2)"),
        (no_program("tc"), "tc (package iproute2)"),
        (no_controller, "the cpu cgroup (version 1, or version 2 with the cpu controller)"),
        (no_mount, "the cpu cgroup (version 1, or version 2 with the cpu controller)"),
        (processes_in_the_root, "a writable cpu cgroup (["),
    ],
)
def test_says_in_one_line_what_is_missing(
    cgroup2: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    take_away: Callable[[pytest.MonkeyPatch, Path], None],
    message: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: f"/sbin/{program}")
    monkeypatch.setattr(cluster, "tear_down_on_signals", lambda: None)  # this process keeps its own handlers
    monkeypatch.setattr(cluster, "_leftovers", set)
    monkeypatch.setattr(cluster, "_make_network", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["cluster", "--cpu", "0.5", "--", "false"])
    take_away(monkeypatch, cgroup2)
    assert cluster.main() == SKIPPED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.cluster: this machine lacks {message}")


def test_exits_with_77() -> None:
    command = [sys.executable, "-m", "benchmarks.cluster", "--", "true"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "/nonexistent"}, capture_output=True, text=True, check=False)
    assert done.returncode == SKIPPED
    assert len(done.stderr.splitlines()) == 1
    assert "lacks" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nodes", "0"), "--nodes 0: must be at least 1"),
        (("--cpu", "0.001"), "--cpu 0.001: must be at least 0.01"),
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
