"""Names and shapes in files against those in the model: transformers' key conversion, one expert at a time.

Files on the hub mostly hold every expert by itself (`experts.3.w1.weight`), models since transformers 5 hold them
stacked (`experts.gate_up_proj [E, 2f, d]`). `transformers.conversion_mapping` says how one becomes the other, and its
own operations do it here, on the tensors of one expert where the tensor belongs to experts. Only this module calls
transformers' loading code, by `hecate.pretrained.versions` and for its models: `get_model_conversion_mapping`, which
peft uses too, and what matches names and converts tensors.
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

__all__ = ["Format", "Results", "Step", "format_of", "not_per_expert", "steps_to_read", "steps_to_write"]


@dataclass(frozen=True)
class Format:
    """What a model's class says about its files; nothing but equal names for a model that is not of transformers.

    Attributes:
        reads: transforms from the names in files, in order; copied for use, since matching changes them.
        writes: those to be reversed for writing: of the files the model came from, else the usual ones.
        prefix: of the base model, which keys may have or lack.
        config: the model's, which operations look at; None if it is not of transformers.
        architecture: class name for `config.json`.
        ignored_missing, ignored_unexpected: regular expressions of keys in files that may lack, or be extra.
        unsaved: names that are not written.
        tied: names of parameters that follow another one.
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
class Step:
    """Tensors that are converted together.

    Attributes:
        target: name of the first result.
        sources: pattern of the converter, or the source's own name -> names, in their natural order.
        converter: of transformers; None where the source is only renamed.
        renamed: what a result's name becomes after the converter.
    """

    target: str
    sources: Mapping[str, Sequence[str]]
    converter: Any = None
    renamed: Callable[[str], str] = str

    @property
    def names(self) -> list[str]:
        """Of all sources."""
        return [name for names in self.sources.values() for name in names]

    @property
    def by_expert(self) -> set[str]:
        """Patterns of sources that hold one expert each; the others are stacked."""
        return {pattern for pattern in self.sources if "*" in pattern}

    @property
    def splits(self) -> bool:
        """Whether the results are one tensor an expert."""
        return self.converter is not None and any("*" in pattern for pattern in self.converter.target_patterns)

    def run(self, tensors: Mapping[str, Sequence[Tensor]], shapes: Mapping[str, torch.Size], config: Any) -> Results:
        """Results by name, of sources by pattern. On the meta device too.

        Args:
            tensors: pattern -> sources.
            shapes: of the model's tensors, which some operations ask for.
            config: see `Format`.
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

    def of_expert(self, expert: int) -> Step:
        """Where the results are one tensor an expert: this step for the only expert `expert` `[1, ...]`."""
        targets = [pattern.replace("*", str(expert)) for pattern in self.converter.target_patterns]
        return replace(self, target=self.target.replace("*", str(expert)), converter=copied(self.converter, targets))


Results = dict[str, Tensor]


@dataclass(frozen=True)
class _Shapes:
    """Stands for the model where an operation asks for the shape of a parameter."""

    shapes: Mapping[str, torch.Size]

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")


def format_of(model: nn.Module) -> Format:
    """Call it before FSDP2 gives the modules other classes, by which transformers would not know them."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return Format()
    load = loading()
    buffers = [name for name, _ in model.named_buffers()]
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    ignored |= {r"rotary_emb\.inv_freq"} if any(b.endswith("rotary_emb.inv_freq") for b in buffers) else set()
    ignored |= {r"(^|\.)position_ids$"} if any(b.endswith("position_ids") for b in buffers) else set()
    writes = getattr(model, "_weight_conversions", None)
    if writes is None:  # never loaded: as `PreTrainedModel.save_pretrained` does then
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


def steps_to_read(form: Format, keys: Iterable[str], names: Collection[str]) -> tuple[list[Step], list[str], Format]:
    """How the tensors of the model `names` are made from those in files.

    Returns:
        Steps; keys that make nothing and are not to be ignored; the format that writes files with such keys.
    """
    if form.config is None:
        keys = sorted(keys)
        return [Step(k, {k: [k]}) for k in keys if k in names], [k for k in keys if k not in names], form
    load = loading()
    transforms = deepcopy(form.reads)
    renamings = [t for t in transforms if isinstance(t, load.renaming)]
    converters = [t for t in transforms if isinstance(t, load.converter)]
    present = dict.fromkeys(names, True)
    steps: dict[str, Step] = {}
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


def steps_to_write(form: Format, names: Iterable[str]) -> list[Step]:
    """How the tensors in files are made from those of the model: transforms reversed, the last one first."""
    if form.config is None:
        return [Step(name, {name: [name]}) for name in names]
    load = loading()
    transforms = [t.reverse_transform() for t in form.writes[::-1]]
    renamings = [t for t in transforms if isinstance(t, load.renaming)]
    converters = [t for t in transforms if isinstance(t, load.converter)]
    steps: dict[str, Step] = {}
    for name in sorted(names, key=load.natural_key):
        target, pattern = converted(name, converters)
        _add(steps, renamed(name, renamings) if pattern is None else target, name, pattern, converters)
    for target, step in steps.items():
        if step.converter is not None:
            steps[target] = replace(step, renamed=lambda name: renamed(name, renamings))
    return list(steps.values())


def _add(steps: dict[str, Step], target: str, source: str, pattern: str | None, converters: Sequence[Any]) -> None:
    """Add one source to the step that makes `target`."""
    if pattern is None:
        if target in steps:
            raise ValueError(f"{source} and {steps[target].names[0]} both make {target}; only one may")
        steps[target] = Step(target, {source: [source]})
        return
    if target not in steps:
        *_, converter = (
            c for c in converters if pattern in c.source_patterns
        )  # of equal ones transformers takes the last
        steps[target] = Step(target, {}, deepcopy(converter))
    sources = steps[target].sources
    steps[target] = replace(steps[target], sources={**sources, pattern: [*sources.get(pattern, ()), source]})


def _any_matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def not_per_expert(step: Step) -> str | None:
    """The operation of `step` that does not act on each expert by itself, in words; None if all do."""
    for operation in () if step.converter is None else step.converter.operations:
        kind = type(operation).__name__
        dims = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
        if kind in ("MergeModulelist", "SplitModulelist"):
            alone = dims == [0]
        elif kind in ("Concatenate", "Chunk", "Interleave", "Transpose"):
            alone = 0 not in dims and getattr(operation, "num_shards_attribute", None) is None
        else:
            alone = kind == "Force16BytesAlignment"  # of transformers 5.0: a copy with the same values
        if not alone:
            return repr(operation)
    return None
