"""`FSSDPConfig.splits="device"`: the bits of "host", no wait in a layer, and errors when the backward pass begins."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from hecate.errors import NonFiniteError
from hecate.models.moe import Routing, TopKGate
from hecate.ranks.messages import HostCopy
from hecate.runtime.tokens import counts
from tests.runtime.helpers import config, gpt, net, tokens
from tests.runtime.reference import full_gradients
from tests.workers import Groups

F32, BF16 = torch.float32, torch.bfloat16


def settings(splits: str, policy: str = "balanced", **changes: Any) -> hecate.FSSDPConfig:
    given = {"master_dtype": BF16, "param_dtype": F32, "dense": "replicate", "kernels": "hecate", "calibrate": False}
    return config(policy, splits=splits, **(given | changes))


def me() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def refuse(*_: object) -> None:
    raise AssertionError("the host waits in a layer")


def train(given: hecate.FSSDPConfig) -> tuple[list[Tensor], list[Any]]:
    """Losses and gradients of three steps of two micro-batches, and what they have counted."""
    model, values, counted = gpt().to(BF16), [], []
    engine = hecate.fully_shard(model, None, given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    on_device = given.splits == "device"
    for step in range(3):
        for part in range(2):
            # Not in a layer: the read of counts by "host", and the wait for those that were sent to the host.
            with (
                mock.patch.object(HostCopy, "wait", refuse),
                mock.patch.object(counts, "_on_host", refuse if on_device else counts._on_host),
            ):
                loss = model(*tokens(10 * step + part, me())).loss
            loss.backward()
            values.append(loss.detach())
        values += [g.clone() for g in full_gradients(engine).values()]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            values.append(model(*tokens(7, me())).loss)
        stats = engine.stats()
        assert stats["splits"] == given.splits
        counted.append([(x["loads"].tolist(), x["copies"], x["imbalance_after"]) for x in stats["layers"]])
    engine.close()
    return values, counted


def same_as_host(**changes: Any) -> int:
    """Compare; the number of copies that were made."""
    expected, counted = train(settings("host", **changes))
    values, counted_too = train(settings("device", rows_per_pair=32, **changes))
    assert counted_too == counted
    for a, b in zip(values, expected, strict=True):
        assert torch.equal(a, b)
    return sum(copies for step in counted for _, copies, _ in step)


def on_several() -> None:
    assert same_as_host() > 0
    assert same_as_host(policy="ep", master_dtype=F32, wire_dtype=BF16) == 0
    same_as_host(rematerialize=True, wire_dtype=BF16, transport="symmetric")


def test_same_bits_on_several_devices(groups: Groups) -> None:
    groups(2).run(on_several)


def test_same_bits_on_one_device() -> None:
    expected, counted = train(settings("host", master_dtype=F32))
    values, counted_too = train(settings("device", master_dtype=F32))
    assert counted_too == counted
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def bend(model: nn.Module, **changes: Tensor) -> Any:
    """Have the first gate's routing contain `changes` in its first rows."""
    gate = next(m for m in model.modules() if isinstance(m, TopKGate))

    def bent(module: nn.Module, args: object, routing: Routing) -> Routing:
        found = routing._asdict()
        for name, rows in changes.items():
            found[name] = torch.cat([rows.to(found[name].dtype), found[name][len(rows) :]])
        return Routing(**found)

    return gate.register_forward_hook(bent)


@pytest.mark.parametrize("ways", ["backward", "next forward"])
@pytest.mark.parametrize(
    ("bent", "error", "message"),
    [
        (
            {"expert_index": torch.tensor([[9, -3]])},
            ValueError,
            r"the router of rank 0 chose 2 experts outside \[0, 4\)",
        ),
        ({"weights": torch.tensor([[float("nan"), 1.0]])}, NonFiniteError, "rank 0 gave 1 weights that are NaN"),
    ],
)
def test_what_is_wrong_is_raised_before_gradients(
    ways: str, bent: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    model = net().to(F32)
    engine = hecate.fully_shard(model, None, settings("device", master_dtype=F32))
    hook, x = bend(model, **bent), torch.randn(6, 8)
    out = model(x).sum()
    hook.remove()
    with pytest.raises(error, match=message):
        out.backward() if ways == "backward" else model(x)
    assert all(p.grad is None for p in model.parameters())
    del out
    model(x).sum().backward()  # once raised, it is over
    assert any(p.grad is not None for p in model.parameters())
    engine.close()


def too_few_rows() -> str:
    model = gpt().to(BF16)
    engine = hecate.fully_shard(model, None, settings("device", rows_per_pair=3))
    loss = model(*tokens(0, me())).loss
    with pytest.raises(RuntimeError, match=r"FSSDPConfig.rows_per_pair=3; it must be at least as large") as caught:
        loss.backward()
    engine.close()
    return str(caught.value)


def test_too_few_rows_per_pair_are_an_error_on_all_ranks(groups: Groups) -> None:
    one, other = groups(2).run(too_few_rows)
    assert one == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrate": "pays"}, r"splits='device' with calibrate='pays'.*must be False, or set splits='host'"),
        ({"policy": "hecate", "calibrate": False}, r"with policy='hecate'.*must be 'balanced' or 'ep'"),
        ({"calibrate": False, "kernels": "torch"}, r"splits='device' with kernels='torch'"),
        (
            {"calibrate": False, "token_halves": True},
            r"splits='device' with token_halves=True: the host would need the counts",
        ),
        ({"calibrate": False, "expert_gemm": "sonicmoe"}, r"splits='device' with expert_gemm='sonicmoe'"),
        ({"calibrate": False, "rows_per_pair": 0}, r"rows_per_pair=0: must be an integer >= 1"),
        ({"splits": "host", "rows_per_pair": 8}, r"rows_per_pair=8 is for splits='device', not for 'host'"),
        ({"splits": "gpu"}, r"FSSDPConfig.splits='gpu': must be one of 'host', 'device'"),
    ],
)
def test_settings_that_need_the_counts_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hecate.FSSDPConfig(**({"splits": "device"} | changes))


def refused() -> list[str]:
    messages = []
    for changes in ({"rows_per_pair": None}, {"master_dtype": F32, "rows_per_pair": 8}):
        with pytest.raises(ValueError, match=r'FSSDPConfig.splits="device"') as caught:
            hecate.fully_shard(gpt().to(F32), None, settings("device", **changes))
        messages.append(str(caught.value))
    return messages


def test_jobs_that_need_the_counts_are_refused(groups: Groups) -> None:
    for without_rows, without_casts in groups(2).run(refused):
        assert "on 2 devices needs rows_per_pair" in without_rows
        assert "copies are a stack of their own" in without_casts
    with pytest.raises(ValueError, match=r"blocks.0.moe.experts computes in torch.bfloat16, .* must be torch.float32"):
        hecate.fully_shard(gpt().to(BF16), None, settings("device", param_dtype=BF16))
    model = gpt().to(F32)
    model.blocks[1].moe.experts.norm = nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"blocks.1.moe.experts has parameters .* share, norm.bias, norm.weight"):
        hecate.fully_shard(model, None, settings("device", master_dtype=F32))
    with pytest.raises(RuntimeError, match=r'splits="device" needs kernels="hecate"; use splits="host"'):
        hecate.fully_shard(gpt().to(F32), None, settings("device", kernels="auto", master_dtype=F32))
