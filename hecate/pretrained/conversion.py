"""Convert names and shapes between files and model with transformers' key conversion, one expert at a time.

Files on the hub mostly hold each expert as separate tensors (`experts.3.w1.weight`); models since transformers 5 hold
experts stacked (`experts.gate_up_proj [E, 2f, d]`). `transformers.conversion_mapping` defines how one becomes the
other. This module runs transformers' own conversion operations, for expert weights on the tensors of one expert at a
time. Only this module calls transformers' loading code, through `hecate.pretrained.versions` and only for transformers
models: `get_model_conversion_mapping` (which peft uses too) and the functions that match names and convert tensors.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hecate.pretrained.versions import converted, copied, loading, renamed, run, used

__all__ = [
    "Conversion",
    "Format",
    "Results",
    "format_of",
    "mixes_experts",
    "not_per_expert",
    "steps_to_read",
    "steps_to_write",
]


@dataclass(frozen=True)
class Format:
    """File format that a model's class defines; for a model that is not of transformers, names are the same in files.

    Attributes:
        reads: transforms from names in files to names in the model, in order; copy before use, matching changes them.
        writes: transforms to reverse for writing: those of the files the model was loaded from, else the class's usual
            ones.
        prefix: prefix of the base model, which keys may have or not.
        config: the model's config, which some operations read; None if the model is not of transformers.
        architecture: class name for `config.json`.
        ignored_missing, ignored_unexpected: regular expressions of keys that may be missing in files, or extra there.
        unsaved: names that are not written.
        tied: names of parameters tied to another one.
    """

    reads: tuple[Any, ...] = ()
    writes: tuple[Any, ...] = ()
    prefix: str = ""
    config: Any = None
    architecture: str = ""
    ignored_missing: tuple[str, ...] = ()
    ignored_unexpected: tuple[str, ...] = ()
    unsaved: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors that are converted together.

    Attributes:
        target: name of the first result.
        sources: source pattern of the converter (without a converter, the source's name) -> names of the sources, in
            natural order.
        converter: transformers' converter; None if the source is only renamed.
        renamed: maps a name that the converter gives to the final name.
    """

    target: str
    sources: Mapping[str, Sequence[str]]
    converter: Any = None
    renamed: Callable[[str], str] = str

    @property
    def names(self) -> list[str]:
        """Names of all sources."""
        return [name for names in self.sources.values() for name in names]

    @property
    def by_expert(self) -> set[str]:
        """Patterns whose sources hold one expert each; sources of other patterns are stacked."""
        return {pattern for pattern in self.sources if "*" in pattern}

    @property
    def splits(self) -> bool:
        """Whether the results are one tensor per expert."""
        return self.converter is not None and any("*" in pattern for pattern in self.converter.target_patterns)

    def run(self, tensors: Mapping[str, Sequence[Tensor]], shapes: Mapping[str, torch.Size], config: Any) -> Results:
        """Convert source tensors to results by name. Works on the meta device too.

        Args:
            tensors: pattern -> source tensors.
            shapes: shapes of the model's tensors, which some operations need.
            config: see `Format`.

        Raises:
            ValueError: two results get the same name.
        """
        if self.converter is None:
            ((tensor,),) = tensors.values()
            return {self.target: tensor}
        for pattern, several in tensors.items():
            for tensor in several:
                self.converter.add_tensor(self.target, self.target, pattern, tensor)
        results = run(self.converter, self.target, _Shapes(shapes), config)
        named = {self.renamed(name): t[0] if isinstance(t, list) else t for name, t in results.items()}
        if len(named) < len(results):
            raise ValueError(f"{', '.join(results)} become {', '.join(named)}; names must be distinct")
        return named

    def of_expert(self, expert: int) -> Conversion:
        """The step for expert `expert` alone, whose sources are `[1, ...]`; only if `splits`."""
        targets = [pattern.replace("*", str(expert)) for pattern in self.converter.target_patterns]
        return replace(self, target=self.target.replace("*", str(expert)), converter=copied(self.converter, targets))


Results = dict[str, Tensor]


@dataclass(frozen=True)
class _Shapes:
    """Stand-in for the model in operations that look up the shape of a parameter."""

    shapes: Mapping[str, torch.Size]

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")


def format_of(model: nn.Module) -> Format:
    """The file format of `model`. Call it before FSDP2 changes the modules' classes, which transformers looks at."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return Format()
    load = loading()
    buffers = [name for name, _ in model.named_buffers()]
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    ignored |= {r"rotary_emb\.inv_freq"} if any(b.endswith("rotary_emb.inv_freq") for b in buffers) else set()
    ignored |= {r"(^|\.)position_ids$"} if any(b.endswith("position_ids") for b in buffers) else set()
    writes = getattr(model, "_weight_conversions", None)
    if writes is None:  # never loaded; `PreTrainedModel.save_pretrained` does the same
        usual = load.mapping(model, add_legacy=False)
        writes = [transform for transform in usual if not isinstance(transform, load.prefix_change)]
    return Format(
        reads=tuple(load.mapping(model)),
        writes=tuple(writes),
        prefix=model.base_model_prefix,
        config=model.config,
        architecture=type(model).__name__,
        ignored_missing=tuple(sorted(model._keys_to_ignore_on_load_missing or ())),
        ignored_unexpected=tuple(sorted(ignored)),
        unsaved=frozenset(model._keys_to_ignore_on_save or ()),
        tied=frozenset(getattr(model, "all_tied_weights_keys", ())),
    )


def steps_to_read(
    form: Format, keys: Iterable[str], names: Collection[str]
) -> tuple[list[Conversion], list[str], Format]:
    """The steps that make the model's tensors `names` from the tensors `keys` in files.

    Returns:
        Steps; unexpected keys (not used and not ignored); the format that writes files with the same keys.
    """
    if form.config is None:
        keys = sorted(keys)
        return [Conversion(k, {k: [k]}) for k in keys if k in names], [k for k in keys if k not in names], form
    load = loading()
    transforms = deepcopy(form.reads)
    renamings = [t for t in transforms if isinstance(t, load.renaming)]
    converters = [t for t in transforms if isinstance(t, load.converter)]
    present = dict.fromkeys(names, True)
    steps: dict[str, Conversion] = {}
    unexpected = []
    keys = sorted(keys, key=load.natural_key)
    for key in keys:
        name, pattern = load.rename(key, renamings, converters, form.prefix, present)
        if name not in names and key in names:
            name, pattern = load.rename(key, [], [], form.prefix, present)
        if name in names:
            _add(steps, name, key, pattern, converters)
        elif not _any_matches(form.ignored_unexpected, (name, key)):
            unexpected.append(key)
    return list(steps.values()), unexpected, replace(form, writes=used(transforms, keys))


def steps_to_write(form: Format, names: Iterable[str]) -> list[Conversion]:
    """The steps that make the tensors in files from the model's: `form.writes` reversed, the last one first."""
    if form.config is None:
        return [Conversion(name, {name: [name]}) for name in names]
    load = loading()
    transforms = [t.reverse_transform() for t in form.writes[::-1]]
    renamings = [t for t in transforms if isinstance(t, load.renaming)]
    converters = [t for t in transforms if isinstance(t, load.converter)]
    steps: dict[str, Conversion] = {}
    for name in sorted(names, key=load.natural_key):
        target, pattern = converted(name, converters)
        _add(steps, renamed(name, renamings) if pattern is None else target, name, pattern, converters)
    for target, step in steps.items():
        if step.converter is not None:
            steps[target] = replace(step, renamed=lambda name: renamed(name, renamings))
    return list(steps.values())


def _add(
    steps: dict[str, Conversion], target: str, source: str, pattern: str | None, converters: Sequence[Any]
) -> None:
    """Add one source to the step that makes `target`."""
    if pattern is None:
        if target in steps:
            raise ValueError(f"{source} and {steps[target].names[0]} both make {target}; only one may")
        steps[target] = Conversion(target, {source: [source]})
        return
    if target not in steps:
        *_, converter = (
            c for c in converters if pattern in c.source_patterns
        )  # if several match, transformers takes the last
        steps[target] = Conversion(target, {}, deepcopy(converter))
    sources = steps[target].sources
    steps[target] = replace(steps[target], sources={**sources, pattern: [*sources.get(pattern, ()), source]})


def _any_matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def mixes_experts(form: Format, names: Iterable[str]) -> str | None:
    """Why files of this format can neither be read nor written one expert at a time; None if they can.

    Args:
        form: format of the model's class.
        names: names of stacked weights of experts.
    """
    for transform in (*form.reads, *form.writes):
        if not getattr(transform, "operations", None):
            continue
        made = [name for name in names if _any_matches(transform.target_patterns, [name])]
        if made and (operation := not_per_expert(Conversion(made[0], {}, transform))):
            return f"transformers' conversion of {made[0]} has {operation}"
    return None


def not_per_expert(step: Conversion) -> str | None:
    """Description of an operation of `step` that mixes experts; None if all act on each expert separately."""
    for operation in () if step.converter is None else step.converter.operations:
        kind = type(operation).__name__
        dims = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
        if kind in ("MergeModulelist", "SplitModulelist"):
            alone = dims == [0]
        elif kind in ("Concatenate", "Chunk", "Interleave", "Transpose"):
            alone = 0 not in dims and getattr(operation, "num_shards_attribute", None) is None
        else:
            # The first, of transformers 5.0, makes a copy with the same values; the other returns a single source.
            alone = kind == "Force16BytesAlignment" or (
                kind == "Inkling2LoopDequantizeExperts" and len(step.sources) < 2
            )
        if not alone:
            return repr(operation)
    return None
