"""A callable of the user, named in the configuration by `_target_` as Hydra does, and its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

__all__ = ["TARGET", "Target"]

TARGET = "_target_"


@dataclass(frozen=True)
class Target:
    """What to call to make a model, data or an optimizer.

    Attributes:
        section: the section of the configuration that names it, for messages.
        path: where it can be imported from, e.g. "my_package.make_model".
        arguments: keyword arguments; those that are mappings with a `_target_` are made first.
    """

    section: str
    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, section: str, values: Mapping[str, Any]) -> Target:
        """Read a section that has the key `_target_`; ValueError if that is no text."""
        path = values[TARGET]
        if not isinstance(path, str):
            raise ValueError(f"{section}.{TARGET}={path!r}: must be the import path of a class or function")
        return cls(section, path, {key: value for key, value in values.items() if key != TARGET})

    def make(self, *first: Any, **more: Any) -> Any:
        """Call it with `first`, the arguments and `more`.

        Raises:
            ValueError: it cannot be imported or called, or raises; the cause is chained.
        """
        try:
            return instantiate({TARGET: self.path, **self.arguments}, *first, _convert_="all", **more)
        except InstantiationException as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise ValueError(
                f"{self.section}.{TARGET}={self.path!r}: {type(cause).__name__}: {cause} (debug=true prints where)"
            ) from error
