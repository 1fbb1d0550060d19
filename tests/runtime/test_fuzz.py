"""Thirty random cases of `tests.runtime.fuzz`; if one fails, the message has the command that repeats it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.fuzz import FuzzCase, run_cases
from tests.workers import Groups

CASES = [FuzzCase.draw(seed) for seed in range(30)]


@pytest.mark.parametrize("devices", sorted({case.devices for case in CASES}))
def test_random_cases(groups: Groups, devices: int, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.devices == devices]
    print("seeds", [case.seed for case in cases])
    for failed in groups(devices).run(run_cases, cases, str(tmp_path)):
        assert not failed, "\n".join(failed)


def test_a_seed_decides_everything() -> None:
    assert FuzzCase.draw(7) == FuzzCase.draw(7)
    assert len({FuzzCase.draw(seed).describe() for seed in range(100)}) == 100
