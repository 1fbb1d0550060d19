"""Process groups that are kept for the whole test session, one per world size, each used by many tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.workers import Groups


@pytest.fixture(scope="session")
def groups() -> Iterator[Groups]:
    """`groups(world_size)` is a spawned process group; `.run(function, *args)` runs on every rank."""
    running = Groups()
    yield running
    running.close()
