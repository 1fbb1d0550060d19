"""A flag counts if any rank has it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hecate.ranks.anywhere import anywhere
from tests.workers import Groups


def _answers() -> list[list[bool]]:
    first, device = dist.get_rank() == 0, torch.device("cpu")
    flags = ([True, not first, False], [True, first], [])
    return [anywhere(some, [dist.group.WORLD], device) for some in flags]


def test_flags_of_all_ranks(groups: Groups) -> None:
    for found in groups(2).run(_answers):
        assert found == [[True, True, False], [True, True], []]
