"""Python programs whose processes have imported Hecate before they begin, which takes a process of its own seconds.

One process for all tests imports `PRELOADED` and forks a child for each `Program`. The child runs the program as
`__main__` on its main thread and ends as every interpreter does: with its exit functions, finalizers, traceback and
exit code. What the interpreter reads when it starts (its options, PYTHONPATH, OMP_NUM_THREADS) has no effect on a
program; tests of those start a process of their own, as do tests of what an import does.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PRELOADED = ("hecate.train.loop", "hydra", "matplotlib.figure", "transformers")
_NUMBER = struct.Struct("i")


class Program:
    """Like `subprocess.Popen([sys.executable, *words])`, which ends and is signalled in the same ways.

    Args:
        words: "-m", a module and its arguments, or "-c", Python text and arguments.
        cwd: where the program runs.
        env: its environment; None: that of this process.
        merged: stderr goes to where stdout goes.

    Attributes:
        pid: of the process, the leader of a session of its own.
        returncode: None while it runs.
    """

    def __init__(
        self,
        words: Sequence[str],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        merged: bool = False,
    ) -> None:
        self._words, self._out = list(words), tempfile.TemporaryFile()  # noqa: SIM115  # closed with this object
        self._error = self._out if merged else tempfile.TemporaryFile()  # noqa: SIM115
        self._connection, theirs = socket.socketpair()
        with theirs:
            files = [theirs.fileno(), self._out.fileno(), self._error.fileno()]
            socket.send_fds(_server(), [b"x"], files)
        given = {"words": self._words, "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
        data = pickle.dumps(given)
        self._connection.sendall(_NUMBER.pack(len(data)) + data)
        self.returncode: int | None = None
        self.pid = self._number()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(self._number())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. TimeoutExpired after `timeout` seconds."""
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self._words, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What was written to stdout and stderr, at the end."""
        self.wait(timeout)
        return self.output(), "" if self._error is self._out else _text(self._error)

    def output(self) -> str:
        """What was written to stdout until now."""
        return _text(self._out)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _number(self) -> int:
        data = self._connection.recv(_NUMBER.size, socket.MSG_WAITALL)
        assert len(data) == _NUMBER.size, "the process that forks programs has ended"
        return int(_NUMBER.unpack(data)[0])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(
    *words: str,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    merged: bool = False,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run([sys.executable, *words])` with both outputs captured as text."""
    program = Program(words, cwd, env, merged)
    try:
        out, error = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess([*words], program.wait(), out, error)


def run_ranks(
    *words: str, ranks: int = 2, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run a program on several processes that have torchrun's variables, as torchrun and srun start them."""
    base = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    base |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    programs = [Program(words, cwd, base | {"RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(ranks)]
    try:
        said = [program.communicate(300.0) for program in programs]
    finally:
        for program in programs:
            program.kill()
    return [
        subprocess.CompletedProcess([*words], program.wait(), *texts)
        for program, texts in zip(programs, said, strict=True)
    ]


def _text(file: Any) -> str:
    """All of a file that is open in a process which still writes at its end."""
    size = os.fstat(file.fileno()).st_size
    return bytes(os.pread(file.fileno(), size, 0)).decode(errors="replace")


@functools.cache
def _server() -> socket.socket:
    """Starts the process that forks; it ends when this process closes the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        words = [sys.executable, "-m", "tests.forked", str(theirs.fileno())]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # a forked process must not use threads of its parent
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(
            words,
            cwd=Path(__file__).parents[1],
            env=env,
            stdin=nothing,
            stdout=nothing,
            start_new_session=True,
            pass_fds=[theirs.fileno()],
        )
    process.returncode = 0  # nobody waits for it
    return ours


def _serve(requests: socket.socket) -> tuple[socket.socket, list[int]]:
    """Fork a child for each request, and report its exit code; returns in the children only."""
    running: dict[int, socket.socket] = {}
    ended, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready = select.select([requests, ended], [], [])[0]
        if ended in ready:
            ended.recv(1 << 12)
            _report(running)
        if requests not in ready:
            continue
        _, files, _, _ = socket.recv_fds(requests, 1, 3)
        if not files:
            sys.exit()
        connection = socket.socket(fileno=files[0])
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            for other in (requests, ended, wake, *running.values()):
                other.close()
            return connection, files[1:]
        connection.sendall(_NUMBER.pack(pid))
        running[pid] = connection
        for file in files[1:]:
            os.close(file)


def _report(running: dict[int, socket.socket]) -> None:
    """Tell those who wait for children that have ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as connection, suppress(OSError):  # the test may not want to know any more
            connection.sendall(_NUMBER.pack(status))


def _become(connection: socket.socket, files: list[int]) -> list[str]:
    """Make this child a process as its program expects it; returns the program's words."""
    with connection:
        size = _NUMBER.unpack(connection.recv(_NUMBER.size, socket.MSG_WAITALL))[0]
        given = pickle.loads(connection.recv(size, socket.MSG_WAITALL))
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, file in zip((1, 2), files, strict=True):
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(given["env"])
    os.chdir(given["cwd"])
    sys.path[0] = given["cwd"]
    importlib.invalidate_caches()
    return list(given["words"])


def main() -> None:
    """Import, fork, and be the program."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child that looks at all imported objects would copy their pages
    kind, what, *arguments = _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
    sys.argv = ["-c" if kind == "-c" else what, *arguments]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
