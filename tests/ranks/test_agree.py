"""An error on one rank is raised on all ranks, whatever its class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist

from hecate.ranks.agree import agree
from hecate.ranks.raised import RemoteError
from tests.workers import Groups


class TwoArgumentsError(Exception):
    """An exception that can be pickled but not unpickled, since `Exception` keeps only the message."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"{name} has {count}")


class OtherTextError(ValueError):
    """An exception that is unpickled as a different one."""

    def __init__(self, text: str) -> None:
        super().__init__(text.upper() + "!")


def plain() -> Exception:
    return ValueError("a plain one")


def local_class() -> Exception:
    class LocalError(Exception):
        pass

    return LocalError("of a class that others do not have")


def without_text() -> Exception:
    class WordlessError(Exception):
        def __str__(self) -> str:
            raise TypeError("no text")

    return WordlessError()


def holds_what_does_not_pickle() -> Exception:
    error = RuntimeError("with a generator")
    error.source = (i for i in range(3))  # type: ignore[attr-defined]
    return error


def two_arguments() -> Exception:
    return TwoArgumentsError("expert 3", 2)


def other_text() -> Exception:
    return OtherTextError("text")


def raise_on_rank_1(make: Callable[[], Exception]) -> tuple[str, str, str]:
    """Class, text and cause of what `agree` raised."""

    def function() -> None:
        if dist.get_rank() == 1:
            raise make()

    try:
        agree(function)
    except Exception as error:
        cause = error.__cause__
        try:
            text = str(error)
        except TypeError:
            text = "none"
        return type(error).__name__, text, str(cause) if isinstance(cause, RemoteError) else "none"
    return "none", "none", "none"


@pytest.mark.parametrize(
    ("make", "own", "elsewhere"),
    [
        (plain, "ValueError: a plain one", "ValueError: a plain one"),
        (
            local_class,
            "LocalError: of a class that others do not have",
            "RuntimeError: rank 1 raised tests.ranks.test_agree.local_class.<locals>.LocalError: "
            "of a class that others do not have",
        ),
        (
            without_text,
            "WordlessError: none",
            "RuntimeError: rank 1 raised tests.ranks.test_agree.without_text.<locals>.WordlessError: "
            "<exception str() failed>",
        ),
        (
            holds_what_does_not_pickle,
            "RuntimeError: with a generator",
            "RuntimeError: rank 1 raised RuntimeError: with a generator",
        ),
        (
            two_arguments,
            "TwoArgumentsError: expert 3 has 2",
            "RuntimeError: rank 1 raised tests.ranks.test_agree.TwoArgumentsError: expert 3 has 2",
        ),
        (
            other_text,
            "OtherTextError: TEXT!",
            "RuntimeError: rank 1 raised tests.ranks.test_agree.OtherTextError: TEXT!",
        ),
    ],
)
def test_every_exception_reaches_all_ranks(
    groups: Groups, make: Callable[[], Exception], own: str, elsewhere: str
) -> None:
    for rank, (name, text, cause) in enumerate(groups(3).run(raise_on_rank_1, make)):
        assert f"{name}: {text}" == (own if rank == 1 else elsewhere)
        assert ("On rank 1:" in cause and "raise make()" in cause) == (rank != 1)


def raise_on_all_but_rank_0() -> list[str]:
    rank = dist.get_rank()

    def function() -> int:
        if rank == 0:
            return 0
        raise ValueError(f"of rank {rank}")

    try:
        agree(function)
    except ValueError as error:
        chain: list[BaseException | None] = [error, error.__cause__, error.__cause__ and error.__cause__.__cause__]
        return [str(e) for e in chain if e is not None and not isinstance(e, RemoteError)]
    return []


def test_the_lowest_rank_that_raised_is_reported_and_the_own_error_kept(groups: Groups) -> None:
    assert groups(3).run(raise_on_all_but_rank_0) == [["of rank 1"], ["of rank 1"], ["of rank 1", "of rank 2"]]


def test_without_a_process_group_it_is_a_call() -> None:
    assert agree(lambda: 3) == 3
    with pytest.raises(TwoArgumentsError):
        agree(lambda: (_ for _ in ()).throw(two_arguments()))
