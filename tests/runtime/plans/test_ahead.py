"""Planning in threads changes when a plan is made, not what it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hecate.placement import Placement
from hecate.runtime.plans.ahead import PlanAhead


@dataclass
class _Outlook:
    value: int
    planned: list[int] = field(default_factory=list)

    def placement(self) -> Placement:
        self.planned.append(self.value)
        return Placement(np.ones((self.value, 1)))

    def equals(self, other: _Outlook) -> bool:
        return self.value == other.value


@dataclass
class _Layer:
    value: int
    planned: list[int] = field(default_factory=list)

    def outlook(self) -> _Outlook:
        return _Outlook(self.value, self.planned)


def _experts(ahead: PlanAhead) -> list[int]:
    return [placement.num_experts for placement in ahead.placements()]


def test_uses_what_was_begun_where_nothing_changed() -> None:
    layers = [_Layer(2), _Layer(3)]
    ahead = PlanAhead(layers, threads=2)  # type: ignore[arg-type]
    ahead.start()
    layers[1].value = 5  # as if one more micro-batch had come
    assert _experts(ahead) == [2, 5]
    assert layers[0].planned == [2]
    assert 5 in layers[1].planned


def test_plans_at_once_where_nothing_was_begun() -> None:
    layers = [_Layer(2), _Layer(3)]
    ahead = PlanAhead(layers, threads=1)  # type: ignore[arg-type]
    assert _experts(ahead) == [2, 3]
    ahead.start()
    ahead.start()
    assert _experts(ahead) == [2, 3]
