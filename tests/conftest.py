"""Process groups that are kept for the whole test session, one per world size, each used by many tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.bench import DTYPES, Bench
from tests.workers import Groups


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "what tests that take the `groups` fixture run on")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="of models and batches (cpu)")
    group.addoption("--backend", choices=("gloo", "nccl"), default="gloo", help="of process groups (gloo)")
    group.addoption("--dtype", choices=tuple(DTYPES), help="of models (float64, or the test's own)")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; programs would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if problem := _bench(config).problem():
        raise pytest.UsageError(problem)


def _bench(config: pytest.Config) -> Bench:
    return Bench(config.getoption("device"), config.getoption("backend"), DTYPES.get(config.getoption("dtype")))


@pytest.fixture(scope="session")
def groups(pytestconfig: pytest.Config) -> Iterator[Groups]:
    """`groups(world_size)` is a spawned process group; `.run(function, *args)` runs on every rank."""
    running = Groups(_bench(pytestconfig))
    yield running
    running.close()
