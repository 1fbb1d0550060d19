"""`benchmarks.skews`: what the tokens choose, and which skews there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.skews import Router, parse_skew
from hecate.loads.trace import TraceWriter
from hecate.models import TopKGate
from hecate.placement import Topology

EXPERTS, TOKENS = 8, 4000


def chosen(skew: str, top_k: int = 2, step: int = 0, layer: int = 0, rank: int = 0) -> Tensor:
    found = parse_skew(skew).choose(TOKENS, EXPERTS, top_k, (step, layer, rank))
    assert found is not None
    assert all(len(set(row)) == top_k for row in found[:50].tolist())
    return found


def loads(skew: str, **changes: int) -> Tensor:
    return chosen(skew, **changes).flatten().bincount(minlength=EXPERTS).double() / TOKENS


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_nothing_to_balance(top_k: int) -> None:
    assert loads("none", top_k=top_k).tolist() == [top_k / EXPERTS] * EXPERTS


def test_zipf_has_its_law_and_its_order() -> None:
    law = torch.arange(1, EXPERTS + 1).double() ** -1.2
    beside = loads("zipf:1.2:beside", top_k=1)
    assert torch.allclose(beside, law / law.sum(), atol=0.03)
    apart = loads("zipf:1.2", top_k=1)
    assert torch.allclose(apart.sort(descending=True).values, law / law.sum(), atol=0.03)
    assert apart.argmax() != loads("zipf:1.2", top_k=1, layer=2).argmax()


def test_the_hot_expert_is_the_first_choice_of_its_share() -> None:
    first = chosen("hot:0.3")[:, 0].bincount(minlength=EXPERTS) / TOKENS
    assert first.max() == pytest.approx(0.3, abs=0.03)
    assert first.sort().values[:-1].max() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("skew", ["zipf:1.2", "drift"])
def test_a_choice_depends_on_step_layer_and_rank_alone(skew: str) -> None:
    assert torch.equal(chosen(skew, step=7, layer=1, rank=1), chosen(skew, step=7, layer=1, rank=1))
    for other in ({"step": 8}, {"layer": 2}, {"rank": 0}):
        assert not torch.equal(
            chosen(skew, **({"step": 7, "layer": 1, "rank": 1} | other)), chosen(skew, step=7, layer=1, rank=1)
        )


def test_drift_moves_from_step_to_step_and_begins_again() -> None:
    skew = parse_skew("drift")

    def popular(step: int) -> Tensor:
        found = skew.choose(TOKENS, EXPERTS, 1, (step, 0, 0))
        assert found is not None
        return found.flatten().bincount(minlength=EXPERTS).double() / TOKENS

    near, far = popular(1), popular(60)
    again = popular(1)  # after a later step: as a recomputation or a new run
    assert torch.equal(near, again)
    assert (far - near).abs().sum() > (popular(2) - near).abs().sum()


def test_a_trace_gives_the_loads_of_its_steps(tmp_path: Path) -> None:
    counts = np.array([[[100, 0, 300, 0, 0, 0, 0, 0]], [[0, 200, 0, 0, 0, 0, 0, 0]]])
    with TraceWriter(tmp_path / "t.npz", Topology(1, 1), [EXPERTS]) as trace:
        for step, each in enumerate(counts):
            trace.append(step, [each])
    skew = f"trace:{tmp_path / 't.npz'}"
    assert loads(skew, top_k=1)[:3].tolist() == pytest.approx([0.25, 0, 0.75], abs=0.03)
    assert loads(skew, top_k=1, step=3)[1] > 0.95  # of the second step again
    with pytest.raises(ValueError, match="has 8 experts, the model 5"):
        parse_skew(skew).choose(3, 5, 1, (0, 0, 0))


@pytest.mark.parametrize("skew", ["best", "zipf", "zipf:x", "zipf:-1", "hot:1.5", "zipf:1:apart", "drift:2", "trace:"])
def test_a_skew_that_does_not_exist_lists_the_valid_ones(skew: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of own, none, zipf:EXPONENT, .*trace:FILE|must be a number > 0"):
        parse_skew(skew)


def test_a_trace_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"skew 'trace:none.npz': .*No such file"):
        parse_skew("trace:none.npz")


def test_router_replaces_the_choice_and_keeps_the_weights() -> None:
    gate = TopKGate(d_model=4, num_experts=EXPERTS, top_k=2)
    torch.nn.init.normal_(gate.weight)
    router, hidden = Router([gate], rank=0), torch.randn(16, 4)
    own = gate(hidden)
    router.skew, router.step = parse_skew("zipf:1.2"), 3
    replaced = gate(hidden)
    expected = parse_skew("zipf:1.2").choose(16, EXPERTS, 2, (3, 0, 0))
    assert expected is not None
    assert torch.equal(replaced.expert_index, expected)
    assert torch.equal(replaced.weights, own.weights)
    assert not torch.equal(own.expert_index, expected)
