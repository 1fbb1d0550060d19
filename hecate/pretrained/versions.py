"""Wrappers of transformers' loading code that hide the differences between versions from 5.0 on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["Loading", "converted", "copied", "loading", "renamed", "run", "used"]


@dataclass(frozen=True)
class Loading:
    """Classes and functions of transformers' loading code.

    Attributes:
        converter, renaming, prefix_change: classes of transforms; the last one is an empty tuple in 5.0.
        mapping: `get_model_conversion_mapping`.
        rename: `rename_source_key`.
        natural_key: `dot_natural_key`.
    """

    converter: Any
    renaming: Any
    prefix_change: Any
    mapping: Callable[..., list[Any]]
    rename: Callable[..., tuple[str, str | None]]
    natural_key: Callable[[str], Any]


@cache
def loading() -> Loading:
    """The loading code of the installed version. `fully_shard` calls this, to fail early if the version lacks it.

    Raises:
        ImportError: the installed version lacks one of the names.
    """
    import transformers

    try:
        from transformers import core_model_loading as core
        from transformers.conversion_mapping import get_model_conversion_mapping

        prefix_change = getattr(core, "PrefixChange", ())
        names = (core.rename_source_key, core.dot_natural_key)
        return Loading(core.WeightConverter, core.WeightRenaming, prefix_change, get_model_conversion_mapping, *names)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fully_shard: transformers {transformers.__version__} does not load weights as the versions that Hecate "
            f"knows (5.0 to 5.24): {error}"
        ) from error


def renamed(name: str, renamings: Iterable[Any]) -> str:
    """`name` after applying all renamings in order."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def converted(name: str, converters: Iterable[Any]) -> tuple[str, str | None]:
    """`name` as renamed by the first converter that matches it, and the matching pattern; None if none matches."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return target, pattern
    return name, None


def used(transforms: Sequence[Any], keys: Iterable[str]) -> tuple[Any, ...]:
    """Those of `transforms` that have matched one of `keys`; in 5.0 they do not say so themselves."""
    if all(hasattr(t, "was_used") for t in transforms):
        return tuple(t for t in transforms if t.was_used())
    found: set[int] = set()
    for name in keys:
        for transform in sorted(transforms, key=lambda t: isinstance(t, loading().converter)):
            name, pattern = transform.rename_source_key(name)
            if pattern is not None:
                found.add(id(transform))
    return tuple(t for t in transforms if id(t) in found)


def run(converter: Any, target: str, model: Any, config: Any) -> dict[str, Any]:
    """What `converter` makes of the tensors it was given; in 5.0 errors come beside it."""
    results = converter.convert(target, model=model, config=config)
    return results[0] if isinstance(results, tuple) else results


def copied(converter: Any, targets: list[str]) -> Any:
    """The same converter with other target patterns; up to 5.20 it has no `copy`."""
    sources, operations = list(converter.source_patterns), converter.operations
    if hasattr(converter, "copy"):
        return converter.copy(sources, targets, operations=operations)
    made = type(converter)(source_patterns=sources, target_patterns=targets, operations=operations)
    for name in ("scope_prefix", "base_model_prefix"):
        if hasattr(converter, name):
            setattr(made, name, getattr(converter, name))
    return made
