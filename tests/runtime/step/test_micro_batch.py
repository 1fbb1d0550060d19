"""The states of a micro-batch: every allowed transition works, and every other one raises an error that names it."""

from __future__ import annotations

import gc
from itertools import product

import pytest

from hecate.runtime.step.micro_batch import MicroBatch, PassState

ALLOWED = {
    ("forward", "waiting"),
    ("forward", "ended"),  # without gradients, or after a pass that raised
    ("waiting", "backward"),
    ("waiting", "ended"),  # its graph was dropped
    ("backward", "ended"),
    ("ended", "backward"),  # again, through a retained graph
}


@pytest.mark.parametrize(("before", "after"), list(product(PassState, PassState)))
def test_changes_of_state(before: PassState, after: PassState) -> None:
    micro_batch = MicroBatch(7, with_grad=True)
    micro_batch.state = before
    if (before.value, after.value) in ALLOWED:
        micro_batch.advance(after)
        assert micro_batch.state is after
        return
    with pytest.raises(RuntimeError, match=f"micro-batch 7: {after.value} cannot follow {before.value}"):
        micro_batch.advance(after)
    assert micro_batch.state is before


def test_the_token_goes_when_nobody_holds_it() -> None:
    micro_batch = MicroBatch(1, with_grad=True)
    assert micro_batch.token is None
    token = micro_batch.new_token()
    assert micro_batch.token is token
    assert token.micro_batch is micro_batch
    del token
    gc.collect()
    assert micro_batch.token is None


def test_the_end_keeps_nothing() -> None:
    micro_batch = MicroBatch(1, with_grad=False)
    released: list[str] = []

    class _Copies:
        def release(self) -> None:
            released.append("copies")

    micro_batch.copies[0] = _Copies()  # type: ignore[assignment]
    micro_batch.end()
    assert released == ["copies"]
    assert not micro_batch.copies
    assert micro_batch.state is PassState.ENDED
