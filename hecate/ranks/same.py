"""Checks that all ranks hold the same values. If not, every rank raises one error that names a rank that differs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

from hecate.placement import Placement
from hecate.ranks.agree import agree, gather
from hecate.ranks.messages import everyones

__all__ = ["agree_on", "check_equal", "check_placements", "check_same", "debugging", "described", "digest"]

Values = Mapping[str, object]
"""Values of one rank: name -> value. They must be picklable; they are compared by `==` and shown by `str()`."""


def debugging() -> bool:
    """Whether HECATE_DEBUG=1 is set: plans are then compared between ranks before they are used. Changes no result."""
    return os.environ.get("HECATE_DEBUG", "0") == "1"


def check_equal(
    what: str, everyone: Sequence[Values], must: str = "pass the same", error: type[Exception] = ValueError
) -> None:
    """Compare values of all ranks that are already known here. Not collective.

    Args:
        what: the call or layer; begins the message.
        everyone: the values of every rank, by rank.
        must: ends the message, after "all ranks must".
        error: class of the exception.

    Raises:
        error: "<what>: <name> is <value> on rank 0 and <value> on rank <r>; all ranks must <must>".
    """
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise error(
                    f"{what}: {name} is {first.get(name)} on rank 0 and {other.get(name)} on rank {rank}; "
                    f"all ranks must {must}"
                )


def check_same(
    what: str,
    values: Values,
    group: dist.ProcessGroup | None = None,
    must: str = "pass the same",
    error: type[Exception] = ValueError,
) -> None:
    """Compare values between all ranks of `group` (None: the default process group). Collective.

    Arguments and errors are those of `check_equal`. Without a process group there is nothing to compare.
    """
    check_equal(what, gather(values, group), must, error)


def agree_on(what: str, values: Callable[[], Values], group: dist.ProcessGroup) -> None:
    """Evaluate `values` on every rank; all ranks raise if it raises on any, or if the results differ. Collective.

    Each rank sends only an eight-byte fingerprint; errors and values are exchanged only if fingerprints differ or
    `values` raised.

    Raises:
        ValueError: values differ; see `check_same`.
        Exception: what `values` raised, on the lowest rank where it did.
    """
    mine: Values = {}
    failure: Exception | None = None
    try:
        mine = values()
    except Exception as raised:
        failure = raised
    fingerprint = -1 if failure is not None else int(digest(repr(dict(mine)).encode())[:15], 16)
    if _all_have(fingerprint, group) and failure is None:
        return
    agree(lambda: _raise(failure), group)
    check_same(what, mine, group)


def check_placements(what: str, placements: Sequence[Placement], group: dist.ProcessGroup) -> None:
    """With HECATE_DEBUG=1, RuntimeError if ranks hold different placements; collective. Without it, does nothing."""
    if debugging():
        values = {f"placement {i}": described(placement) for i, placement in enumerate(placements)}
        check_same(what, values, group, "make the same plan", RuntimeError)


def described(placement: Placement) -> str:
    """A short text that differs for different placements."""
    size = f"{placement.num_experts} experts on {placement.num_devices} devices"
    return f"[{size}, {placement.matrix.sum()} holders, sha256 {digest(placement.matrix.tobytes())[:16]}]"


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _all_have(fingerprint: int, group: dist.ProcessGroup) -> bool:
    return all(other == fingerprint for other in everyones(fingerprint, group))


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure
