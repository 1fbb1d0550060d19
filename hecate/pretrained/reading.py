"""Read a folder's tensors into a model, one expert or one dense tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.checkpoint.rows import ExpertRows
from hecate.checkpoint.state import Entry
from hecate.pretrained.conversion import Conversion, Format, Results
from hecate.pretrained.entries import local_part
from hecate.pretrained.files import WeightFiles

__all__ = ["Reading"]


@dataclass(frozen=True)
class Reading:
    """The tensors of a folder and the steps that convert them to the model's.

    Attributes:
        where: name of the call, for error messages.
        files: files of the folder.
        entries: the model's tensors by name.
        shapes: see `shapes_of`.
        steps: conversion steps, in the order of the files' keys.
        writes: the format that writes files with the same keys.
    """

    where: str
    files: WeightFiles
    entries: Mapping[str, Entry]
    shapes: Mapping[str, torch.Size]
    steps: tuple[Conversion, ...]
    writes: Format

    def values(self, step: Conversion) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (local tensor of the model, its new value on the CPU) made by `step`, one expert at a time."""
        target = self.entries[step.target]
        if isinstance(target, ExpertRows):
            for expert in target.experts.tolist():
                for name, value in self.convert(step, self._of_expert(step, expert)).items():
                    yield self.rows(name).from_expert(expert)[:1], value
        elif step.converter is None:
            local, index = local_part(target)
            yield local, self.files.read(step.names[0], index)
        else:
            whole = {pattern: [self.files.read(key) for key in keys] for pattern, keys in step.sources.items()}
            for name, value in self.convert(step, whole).items():
                entry = self.entries[name]
                assert isinstance(entry, Tensor)
                local, index = local_part(entry)
                yield local, value[index]

    def metas(self, step: Conversion) -> Results:
        """The results of `step` on the meta device; for experts, the results of one expert."""
        stacks = self.is_expert(step.target)
        metas = {}
        for pattern, keys in step.sources.items():
            shapes = [self.files.tensors[key].shape for key in keys]
            if stacks:
                shapes = shapes[:1] if pattern in step.by_expert else [torch.Size((1, *shapes[0][1:]))]
            metas[pattern] = [torch.empty(shape, device="meta") for shape in shapes]
        return self.convert(step, metas)

    def convert(self, step: Conversion, sources: Mapping[str, Sequence[Tensor]]) -> Results:
        """The results of `step` for source tensors by pattern; for experts, stacks of one expert."""
        return step.run(sources, self.shapes, self.writes.config)

    def is_expert(self, name: str) -> bool:
        """Whether the model's tensor of that name is stacked by expert."""
        return isinstance(self.entries.get(name), ExpertRows)

    def rows(self, name: str) -> ExpertRows:
        """The rows of a stacked tensor that this rank owns."""
        rows = self.entries[name]
        assert isinstance(rows, ExpertRows), name
        return rows

    def _of_expert(self, step: Conversion, expert: int) -> dict[str, list[Tensor]]:
        """The source tensors of one expert by pattern; from stacked sources, its row as `[1, ...]`."""
        sources = {}
        for pattern, keys in step.sources.items():
            if pattern in step.by_expert:
                sources[pattern] = [self.files.read(keys[expert])]
            else:
                rest = (slice(0, n) for n in self.files.tensors[keys[0]].shape[1:])
                sources[pattern] = [self.files.read(keys[0], (slice(expert, expert + 1), *rest))]
        return sources
