"""Tokens sent in bfloat16: what is rounded and what is not; the layer's result is the same within rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hecate
from hecate.experts import ExpertsSpec, WeightSpec
from hecate.models.gpt import GPTMoE
from hecate.placement import Topology
from hecate.planning.plan import Plan
from hecate.runtime.setup import resolve_dtypes
from hecate.runtime.tokens.by_node import node_dispatch
from hecate.runtime.tokens.direct import direct_dispatch
from hecate.runtime.tokens.dispatch import dispatch_of
from hecate.runtime.tokens.exchange import AllToAll, Dispatch
from tests.runtime.helpers import config
from tests.runtime.reference import TINY, Case, full_gradients, run_twice
from tests.runtime.tokens.exchanges import EXPERTS, TOP_K, WIDTH, cost, run, setting
from tests.workers import Groups

BF16 = torch.bfloat16
ROUNDING = 2.0**-7
"""Relative to the norm; half of it is the most that one rounding to bfloat16 changes."""


def close(name: str, got: Tensor, expected: Tensor) -> None:
    error, size = (got.double() - expected.double()).norm(), expected.double().norm()
    assert error <= ROUNDING * size, f"{name}: off by {error / size:.2e} of its norm"


def travel(
    way: Callable[..., Dispatch], plan: Plan, picks: list[Tensor], topology: Topology, dtype, wire
) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Output, and gradients of tokens and weights, by one exchange."""
    rank = dist.get_rank()
    comms = SimpleNamespace(rank=rank, topology=topology, tokens=dist.group.WORLD, guard=nullcontext)
    held = plan.placement.held_by(rank).tolist()
    record = way(plan, picks[rank], comms, held, wire)
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(len(picks[rank]), WIDTH, generator=generator).to(dtype)
    weights = torch.rand(picks[rank].shape, generator=generator).to(dtype)
    scale = torch.linspace(0.5, 2, EXPERTS, dtype=dtype)[held].unsqueeze(1)
    return run(record, hidden, weights, scale)


def compare(devices: int, per_node: int, dtype: torch.dtype) -> None:
    """Run both exchanges without bfloat16 on the wire once, and with it twice."""
    changed = torch.zeros(2)
    for seed in range(3):
        case = setting(devices, per_node, seed)
        exact = travel(direct_dispatch, *case, dtype, None)
        for i, way in enumerate((direct_dispatch, node_dispatch)):
            got, again = (travel(way, *case, dtype, BF16) for _ in range(2))
            for name, a, b, c in zip(("output", "tokens", "weights"), exact, got, again, strict=True):
                where = f"{way.__name__}, {name}, seed {seed}"
                assert a.dtype == b.dtype
                close(where, b, a)
                assert torch.equal(b, c), f"{where}: another run, other bits"
                changed[i] += not torch.equal(a, b)
    dist.all_reduce(changed)
    if dtype != BF16:
        assert (changed > 0).all() if devices > 1 else not changed.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16])
@pytest.mark.parametrize(("devices", "per_node"), [(1, 1), (2, 1), (3, 3), (4, 2)])
def test_equal_within_rounding(groups: Groups, devices: int, per_node: int, dtype: torch.dtype) -> None:
    groups(devices).run(compare, devices, per_node, dtype)


def payloads(devices: int, per_node: int, wire: torch.dtype | None) -> dict[str, set[tuple[int, torch.dtype]]]:
    """(width, dtype) of everything that an exchange sends, by exchange."""
    sent: dict[str, set[tuple[int, torch.dtype]]] = {}
    send = dist.all_to_all_single
    for way in (direct_dispatch, node_dispatch):
        seen = sent.setdefault(way.__name__, set())

        def watched(out, rows, *args, seen=seen, **options):  # type: ignore[no-untyped-def]
            seen.add((rows.shape[1] if rows.ndim > 1 else 1, rows.dtype))
            return send(out, rows, *args, **options)

        with patch.object(dist, "all_to_all_single", watched):
            travel(way, *setting(devices, per_node, 1), torch.float32, wire)
    return sent


@pytest.mark.parametrize(("wire", "expected"), [(None, torch.float32), (BF16, BF16), (torch.float32, torch.float32)])
def test_rows_are_cast_weights_and_counts_are_not(
    groups: Groups, wire: torch.dtype | None, expected: torch.dtype
) -> None:
    for sent in groups(4).run(payloads, 4, 2, wire):
        assert sent["direct_dispatch"] == {(WIDTH, expected)}
        pairs, weights = (TOP_K, torch.int32), (TOP_K, torch.float32)
        assert sent["node_dispatch"] == {pairs, weights, (WIDTH, expected)}


def send_thirds() -> None:
    """Each rank sends two rows to each of two ranks and gets two of each."""
    rank = dist.get_rank()
    comms = SimpleNamespace(rank=rank, tokens=dist.group.WORLD, guard=nullcontext)
    rows = (torch.arange(8, dtype=torch.float32).view(4, 2) + 1) / 3 + rank
    other = (torch.arange(8, dtype=torch.float32).view(4, 2) + 1) / 3 + 1 - rank
    got = AllToAll.apply(rows, (2, 2), (2, 2), comms, BF16)
    mine, foreign = slice(2 * rank, 2 * rank + 2), slice(2 - 2 * rank, 4 - 2 * rank)
    assert torch.equal(got[mine], rows[mine])
    assert torch.equal(got[foreign], other[mine].to(BF16).float())
    assert not torch.equal(got[foreign], other[mine])


def test_rows_that_stay_are_not_rounded(groups: Groups) -> None:
    groups(2).run(send_thirds)


def test_dispatch_hands_the_wire_on(groups: Groups) -> None:
    assert groups(2).run(chosen, 10**12) == ["DirectDispatch"] * 2
    assert groups(2).run(chosen, 1000) == ["NodeDispatch"] * 2


def chosen(inter: int) -> str:
    """The kind of record that the cost model chooses; its wire dtype must be the configured one."""
    rank = dist.get_rank()
    plan, picks, topology = setting(2, 1, 1)
    comms = SimpleNamespace(rank=rank, topology=topology, tokens=dist.group.WORLD, guard=nullcontext)
    held = plan.placement.held_by(rank).tolist()
    record = dispatch_of(plan, picks[rank], comms, held, cost(inter), BF16)
    assert record.wire == BF16
    return type(record).__name__


def train(settings: hecate.FSSDPConfig) -> tuple[int, dict[str, Tensor]]:
    """Bytes of a token by the cost model, and the gradients of one step."""
    torch.manual_seed(0)
    model = GPTMoE(TINY)
    engine = hecate.fully_shard(model, None, settings)
    tokens = torch.randint(31, (4, 17), generator=torch.Generator().manual_seed(dist.get_rank()))
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    return engine._engine.layers[0].cost.token_bytes, full_gradients(engine)


def test_a_model_trains_with_it(groups: Groups) -> None:
    (plain_bytes, exact), *_ = groups(2).run(train, config("balanced"))
    (wire_bytes, rounded), *_ = groups(2).run(train, config("balanced", wire_dtype=BF16))
    assert (plain_bytes, wire_bytes) == (4 * TINY.d_model, 2 * TINY.d_model)
    assert any(not torch.equal(rounded[name], grad) for name, grad in exact.items())
    close("gradients", *(torch.cat([g.flatten() for g in grads.values()]) for grads in (rounded, exact)))


def test_same_seed_same_bits(groups: Groups) -> None:
    settings = config("balanced", wire_dtype=BF16, rematerialize=True, reshard_interval=2)
    groups(3).run(run_twice, Case(settings, dtype=torch.float32, steps=4))


@pytest.mark.parametrize("wire", [torch.float16, torch.int8, "bfloat16"])
def test_dtypes_that_cannot_travel(wire: object) -> None:
    with pytest.raises(ValueError, match=r"FSSDPConfig.wire_dtype=.*must be torch.float64"):
        hecate.FSSDPConfig(wire_dtype=wire)  # type: ignore[arg-type]


def test_at_most_as_wide_as_compute() -> None:
    weight = WeightSpec("up", (4, 4), torch.float32, trainable=True)
    spec = ExpertsSpec("moe", 2, 4, (weight,), lambda rows, groups, weights: rows)
    assert resolve_dtypes(spec, hecate.FSSDPConfig()).wire is None
    assert resolve_dtypes(spec, hecate.FSSDPConfig(wire_dtype=torch.float32)).wire == torch.float32
    with pytest.raises(ValueError, match=r"moe: .*wire_dtype=torch.float64 is wider than torch.float32"):
        resolve_dtypes(spec, hecate.FSSDPConfig(wire_dtype=torch.float64))
    with pytest.raises(ValueError, match=r"wire_dtype=torch.float32 is wider than torch.bfloat16"):
        resolve_dtypes(spec, hecate.FSSDPConfig(param_dtype=BF16, wire_dtype=torch.float32))
