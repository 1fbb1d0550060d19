"""Checks that values of the configuration have the types that dataclasses declare."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

__all__ = ["check_types"]

NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}


def check_types(kind: type, section: str, values: Mapping[str, Any]) -> None:
    """ValueError that names the first value whose type is not that of the field; fields of other types are not checked.

    Args:
        kind: a dataclass.
        section: prefix of the keys in the message, e.g. "optimizer."; may be empty.
        values: value by field name.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        wanted = _simple(hints[name])
        size = len(typing.get_args(hints[name]))
        if typing.get_origin(hints[name]) is tuple and (not isinstance(value, tuple) or len(value) != size):
            raise ValueError(f"{section}{name}={value!r}: must be a list of {size}")
        items = value if isinstance(value, tuple) else (value,)
        if wanted and not all(_fits(item, wanted) for item in items):
            rule = " or ".join(NAMES[one] for one in wanted)
            raise ValueError(f"{section}{name}={value!r}: must be {rule}{' each' if isinstance(value, tuple) else ''}")


def _simple(hint: Any) -> list[type]:
    """The simple types that a value may have; empty if others are allowed."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    inside = typing.get_args(hint) if union or typing.get_origin(hint) is tuple else (hint,)
    return list(dict.fromkeys(inside)) if all(one in NAMES for one in inside) else []


def _fits(value: object, wanted: list[type]) -> bool:
    if isinstance(value, int) and not isinstance(value, bool) and float in wanted:
        return True
    return type(value) in wanted
