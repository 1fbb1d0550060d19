"""Checks of the records that are read from files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["check_integers", "record_of"]

Record = TypeVar("Record")


def check_integers(what: str, record: Any, others: Collection[str], may_be_zero: Collection[str]) -> None:
    """ValueError naming the first field of a dataclass that is no integer, or too small.

    Args:
        what: begins the message, e.g. "cluster h100".
        record: the dataclass.
        others: its fields that are no integers.
        may_be_zero: its fields that must be at least 0; all others must be at least 1.
    """
    for field in fields(record):
        value, least = getattr(record, field.name), 0 if field.name in may_be_zero else 1
        if field.name not in others and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{what}: {field.name}={value!r}, must be an integer >= {least}")


def record_of(kind: type[Record], what: str, values: Mapping[str, Any]) -> Record:
    """The dataclass `kind` with these values; ValueError lists keys that are missing or unknown."""
    valid = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # of a dataclass
    if set(values) != valid:
        missing, extra = sorted(valid - set(values)), sorted(set(values) - valid)
        raise ValueError(f"{what}: missing keys {missing}, unknown keys {extra}")
    return kind(**{str(key): value for key, value in values.items()})
