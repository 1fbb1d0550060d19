"""A cluster on one machine: a network namespace per node, rate-limited links between nodes, a CPU share per rank.

    python -m benchmarks.cluster --nodes 2 --devices-per-node 4 --inter-mbit 400 --cpu 0.22 -- COMMAND...

runs COMMAND once per rank with torchrun's variables set. Ranks of a node communicate over its loopback, nodes through a
switch in a separate namespace, so that all traffic stays on addresses made here. Namespaces, links, cgroups and
processes are removed afterwards, also if a rank dies or the run is interrupted; the next launcher removes what a killed
one left.
If root, iproute2 or the cpu cgroup are missing, it prints one line and exits with code 77.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

__all__ = ["MissingError", "Rank", "emulated", "loopback", "run", "take_share", "tear_down_on_signals"]

SKIPPED = 77
PERIOD_US = 5000  # short, so that a rank out of its share does not stall the others for long
LEAST_QUOTA_US = 1000  # the kernel's minimum
LEAST_CPU = 0.01  # a period of 0.1 s
PREFIX = "hecate-"
SUBNET = "10.77.0"
PORT = 29500
SHARE = "HECATE_CLUSTER_SHARE"
"""The variable that tells a rank the number of the open file that puts it into its cgroup; see `take_share`."""
MOUNTS = Path("/proc/mounts")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class MissingError(RuntimeError):
    """Something that an emulated cluster needs is missing on this machine."""


@dataclass(frozen=True)
class Rank:
    """Where and how one rank runs.

    Attributes:
        env: torchrun's variables.
        prefix: command words before the command itself.
        procs: the file that puts a process into the rank's cgroup, if it has one.
    """

    env: dict[str, str]
    prefix: tuple[str, ...] = ()
    procs: Path | None = field(default=None)

    def start(self, command: Sequence[str], late: bool = False) -> subprocess.Popen[bytes]:
        """Run `command`, in a session of its own. `late`: it calls `take_share` itself."""
        words, env = [*self.prefix, *command], os.environ | self.env
        if self.procs is None:
            return subprocess.Popen(words, env=env, start_new_session=True)
        if late:  # open already: a network namespace has another /sys
            with self.procs.open("w") as file:
                share = file.fileno()
                return subprocess.Popen(words, env=env | {SHARE: str(share)}, start_new_session=True, pass_fds=[share])
        words = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.procs), *words]
        return subprocess.Popen(words, env=env, start_new_session=True)


def take_share() -> None:
    """In a command that was started `late`: confine this process to its rank's share of a core from now on.

    Python's imports take seconds of a whole core; they need not take the time of a share.
    """
    if share := os.environ.get(SHARE):
        with open(int(share), "w") as file:
            file.write(str(os.getpid()))


def rank_env(rank: int, nodes: int, per_node: int, address: str, port: int, interface: str) -> dict[str, str]:
    """The variables that torchrun sets, and gloo's interface."""
    node, local = divmod(rank, per_node)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "GROUP_RANK": str(node),
        "WORLD_SIZE": str(nodes * per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
    }


def loopback(nodes: int, per_node: int) -> list[Rank]:
    """Ranks on this machine without emulation; each `per_node` of them count as one node."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    return [Rank(rank_env(r, nodes, per_node, "127.0.0.1", port, "lo")) for r in range(nodes * per_node)]


@contextmanager
def emulated(nodes: int, per_node: int, inter_mbit: int, cpu: float | None) -> Iterator[list[Rank]]:
    """Ranks on an emulated cluster that exists inside the `with`.

    Args:
        nodes: nodes.
        per_node: ranks per node.
        inter_mbit: bandwidth out of and into each node, in Mbit/s.
        cpu: CPU share of each rank, in cores; None for no limit.

    Raises:
        MissingError: root, iproute2 or the cpu cgroup is missing.
    """
    _check(cpu)
    name = f"{PREFIX}{os.getpid()}"
    with ExitStack() as stack:
        stack.callback(_remove, name)
        _make_network(name, nodes, inter_mbit)
        groups: list[Path | None] = [None] * (nodes * per_node)
        if cpu is not None:
            root = _cgroup_root()
            groups = [_make_cgroup(root, name, r, cpu) for r in range(nodes * per_node)]
        yield [
            Rank(
                rank_env(r, nodes, per_node, f"{SUBNET}.1", PORT, "eth0"),
                ("ip", "netns", "exec", f"{name}-{r // per_node}"),
                group,
            )
            for r, group in enumerate(groups)
        ]


def run(command: Sequence[str], ranks: Sequence[Rank], grace: float = 60.0, late: bool = False) -> int:
    """Run `command` on every rank and wait for all. `late`: it calls `take_share` when its imports are done.

    Returns:
        0, or the exit code of the first rank that failed (128 + signal where one ended it). The others then have
        `grace` seconds to fail by themselves. No process of theirs is left.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.extend(rank.start(command, late) for rank in ranks)
        return _wait(processes, grace)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> int:
    failed, deadline = 0, float("inf")
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        if not failed:
            failed = next((c for c in (p.poll() for p in processes) if c), 0)
            if failed:
                deadline = time.monotonic() + grace
        time.sleep(0.05)
    failed = failed or next((c for c in (p.poll() for p in processes) if c), 0)
    return 128 - failed if failed < 0 else failed


def _check(cpu: float | None) -> None:
    if os.geteuid() != 0:
        raise MissingError("root (network namespaces and cgroups)")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise MissingError(f"{program} (package iproute2)")
    for stale in _leftovers():
        _remove(stale)
    if cpu is not None:
        _cgroup_root()


def _leftovers() -> set[str]:
    """Names of clusters whose launcher does not run any more."""
    folders = [Path("/run/netns")]
    with suppress(MissingError):
        folders.append(_cgroup_root())
    names = {p.name for folder in folders if folder.is_dir() for p in folder.glob(f"{PREFIX}[0-9]*")}
    clusters = {"-".join(name.split("-")[:2]) for name in names}
    return {c for c in clusters if not Path("/proc", c.removeprefix(PREFIX)).exists()}


def _make_network(name: str, nodes: int, inter_mbit: int) -> None:
    """Make a namespace per node, connected by a veth, limited in both directions, to a bridge in another one."""
    # A burst of 5 ms keeps the rate at a timer tick of 4 ms; the queue holds 20 ms more.
    burst = max(64_000, inter_mbit * 1_000_000 // 8 * 5 // 1000)
    limit = ("root", "tbf", "rate", f"{inter_mbit}mbit", "burst", str(burst), "latency", "20ms")
    switch = f"{name}-switch"
    _call("ip", "netns", "add", switch, missing="a network namespace")
    _call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge", missing="a network bridge")
    _call("ip", "-n", switch, "link", "set", "bridge", "up")
    for node in range(nodes):
        space, port = f"{name}-{node}", f"port{node}"
        _call("ip", "netns", "add", space)
        _call("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        _call("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _call("ip", "-n", space, "address", "add", f"{SUBNET}.{node + 1}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _call("ip", "-n", space, "link", "set", link, "up")
        _call("tc", "-n", space, "qdisc", "add", "dev", "eth0", *limit, missing="tc's token bucket filter")
        _call("tc", "-n", switch, "qdisc", "add", "dev", port, *limit)


def _cgroup_root() -> Path:
    """The folder in which cpu cgroups are made: of version 1, or of version 2 with the cpu controller."""
    mounts = [line.split() for line in MOUNTS.read_text().splitlines()]
    for _, folder, kind, options, *_ in mounts:
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(folder)
    for _, folder, kind, *_ in mounts:
        if kind == "cgroup2" and "cpu" in Path(folder, "cgroup.controllers").read_text().split():
            return Path(folder)
    raise MissingError("the cpu cgroup (version 1, or version 2 with the cpu controller)")


def period_us(cpu: float) -> int:
    """Microseconds after which a rank gets its share of `cpu` cores anew; long enough for the minimum."""
    return max(PERIOD_US, math.ceil(LEAST_QUOTA_US / cpu))


def _make_cgroup(root: Path, name: str, rank: int, cpu: float) -> Path:
    """A cgroup with `cpu` cores below `root`; returns the file that takes processes."""
    period = period_us(cpu)
    quota = round(cpu * period)
    folder = root / name / f"rank{rank}"
    try:
        if (root / "cgroup.controllers").exists():
            # Refused where `root` has processes and is not the machine's, as in a container.
            (root / "cgroup.subtree_control").write_text("+cpu")
            folder.parent.mkdir(exist_ok=True)
            (folder.parent / "cgroup.subtree_control").write_text("+cpu")
            folder.mkdir()
            (folder / "cpu.max").write_text(f"{quota} {period}")
        else:
            folder.mkdir(parents=True)
            (folder / "cpu.cfs_period_us").write_text(str(period))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
    except OSError as error:
        raise MissingError(f"a writable cpu cgroup ({error})") from error
    return folder / "cgroup.procs"


def _remove(name: str) -> None:
    """Remove processes, cgroups and namespaces of one cluster; a veth and its limits are removed with its namespace."""
    with suppress(MissingError):
        group = _cgroup_root() / name
        for folder in (*group.glob("rank*"), group):
            _retry(partial(_end, folder))
    for space in Path("/run/netns").glob(f"{name}-*"):
        for pid in subprocess.run(["ip", "netns", "pids", space.name], capture_output=True, text=True).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _call("ip", "netns", "delete", space.name)


def _end(folder: Path) -> None:
    if not folder.is_dir():
        return
    for pid in (folder / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    folder.rmdir()


def _retry(action: Callable[[], None], seconds: float = 5.0) -> None:
    """Retry until it works: a killed process needs a moment to leave its cgroup."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _call(*command: str, missing: str | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        if missing is not None:
            raise MissingError(f"{missing} ({said})")
        raise RuntimeError(f"{' '.join(command)}: {said}")


def tear_down_on_signals() -> None:
    """Raise an exception on SIGINT and SIGTERM, so that every `with` block is left, instead of dying at once."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    for further in SIGNALS:  # ignored from now on, so that nothing interrupts the tear-down
        signal.signal(further, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--devices-per-node", type=int, default=4)
    parser.add_argument("--inter-mbit", type=int, default=400, help="Mbit/s out of and into each node")
    parser.add_argument("--cpu", type=float, help="CPU share of each rank, in cores (default: no limit)")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds that ranks may outlive one that failed")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND...")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    for name in ("nodes", "devices_per_node", "inter_mbit"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.nodes > 250:
        parser.error(f"--nodes {args.nodes}: must be at most 250, one address each")
    if args.cpu is not None and args.cpu < LEAST_CPU:
        parser.error(f"--cpu {args.cpu}: must be at least {LEAST_CPU}")
    if not command:
        parser.error("no command; pass it after --")
    tear_down_on_signals()
    try:
        with emulated(args.nodes, args.devices_per_node, args.inter_mbit, args.cpu) as ranks:
            return run(command, ranks, args.grace)
    except MissingError as missing:
        print(f"benchmarks.cluster: this machine lacks {missing}", file=sys.stderr)
        return SKIPPED


if __name__ == "__main__":
    sys.exit(main())
