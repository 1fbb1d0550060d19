"""Write a model under FSSDP to files: which rank writes which tensor, and how the data reaches that rank.

Beyond the tensors it owns, a rank holds at most one expert or the dense tensors of one step. If the files have
separate tensors per expert, each expert is written by its owner. If the files have stacked experts, one rank per stack
writes it and receives the experts one at a time. Dense tensors are gathered step by step, and one rank writes them.
Stacks and dense steps are assigned to the ranks round-robin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from hecate.checkpoint.rows import ExpertRows
from hecate.checkpoint.state import Entry
from hecate.pretrained.conversion import Conversion, Format, Results, not_per_expert
from hecate.pretrained.files import ShardFile, TensorMeta
from hecate.ranks.agree import rank_and_world
from hecate.ranks.messages import recv, send
from hecate.text import listed

__all__ = ["Writing"]


@dataclass(frozen=True)
class Writing:
    """The tensors of a model and the steps that convert them for files.

    Attributes:
        where: name of the call, for error messages.
        entries: the model's tensors by name.
        owners: name of a stacked tensor -> int64 `[num_experts]`, the owner of each expert.
        shapes: see `shapes_of`.
        steps: conversion steps, the same on all ranks.
        form: file format of the model.
        group: process group of the devices that share experts; None for a single device.
        replica, replicas: index of this device's replica, and number of replicas.
    """

    where: str
    entries: Mapping[str, Entry]
    owners: Mapping[str, NDArray[np.int64]]
    shapes: Mapping[str, torch.Size]
    steps: tuple[Conversion, ...]
    form: Format
    group: dist.ProcessGroup | None
    replica: int
    replicas: int

    def check(self) -> None:
        """ValueError if a step mixes experts and dense tensors, or cannot be run one expert at a time."""
        for step in self.steps:
            if len({self._is_expert(name) for name in step.names}) > 1:
                raise ValueError(f"{self.where}: {listed(step.names)} are written together, but not all are experts'")
            if self._is_expert(step.names[0]) and (operation := not_per_expert(step)):
                raise ValueError(
                    f"{self.where}: {step.names[0]} cannot be written one expert at a time: transformers' conversion "
                    f"has {operation}"
                )

    def tensors(self) -> Iterator[tuple[str, TensorMeta]]:
        """Name, dtype and shape of all tensors that this rank writes."""
        for number, step in enumerate(self.steps):
            if not self._is_expert(step.names[0]):
                if self._writes_dense(number):
                    yield from ((name, TensorMeta.of(value)) for name, value in self._metas(step).items())
            elif step.splits:
                for expert in self._experts(number, step):
                    yield from ((name, TensorMeta.of(v)) for name, v in self._metas(step.of_expert(expert)).items())
            elif self._stack_writer(number) == (self.replica, self._rank):
                num_experts = len(self.owners[step.names[0]])
                for name, value in self._metas(step).items():
                    yield name, TensorMeta.of(value.expand(num_experts, *value.shape[1:]))

    def run(self, files: Mapping[str, ShardFile]) -> None:
        """Write the tensors of all ranks. Collective.

        Args:
            files: name of each tensor that this rank writes -> its file.
        """
        for number, step in enumerate(self.steps):
            if not self._is_expert(step.names[0]):
                self._write_dense(number, step, files)
            elif step.splits:
                for expert in self._experts(number, step):
                    rows = {p: [self._row(n, expert) for n in names] for p, names in step.sources.items()}
                    for name, value in self._convert(step.of_expert(expert), rows).items():
                        files[name].write(name, value)
            elif self._stack_writer(number)[0] == self.replica:
                self._write_stack(number, step, files)

    # Which rank writes.

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def _writes_dense(self, number: int) -> bool:
        rank, world = rank_and_world()
        return number % world == rank

    def _experts(self, number: int, step: Conversion) -> list[int]:
        """The experts of a step that this rank writes as separate tensors."""
        rows = self.entries[step.names[0]]
        assert isinstance(rows, ExpertRows)
        return rows.experts.tolist() if number % self.replicas == self.replica else []

    def _stack_writer(self, number: int) -> tuple[int, int]:
        """Replica and rank in the group of the rank that writes step `number`'s stack."""
        size = 1 if self.group is None else self.group.size()
        return number % self.replicas, number // self.replicas % size

    # Moving data to the writing rank.

    def _write_dense(self, number: int, step: Conversion, files: Mapping[str, ShardFile]) -> None:
        whole = {pattern: [self._whole(name) for name in names] for pattern, names in step.sources.items()}
        if self._writes_dense(number):
            for name, value in self._convert(step, whole).items():
                files[name].write(name, value)

    def _write_stack(self, number: int, step: Conversion, files: Mapping[str, ShardFile]) -> None:
        _, writer = self._stack_writer(number)
        for expert in range(len(self.owners[step.names[0]])):
            rows = {p: [self._bring(name, expert, writer) for name in names] for p, names in step.sources.items()}
            if self._rank == writer:
                for name, value in self._convert(step, rows).items():
                    files[name].write(name, value, expert)

    def _bring(self, name: str, expert: int, writer: int) -> Tensor:
        """Send an expert `[1, ...]` from its owner to `writer` and return it; undefined values on other ranks."""
        owner = int(self.owners[name][expert])
        entry = self.entries[name]
        assert isinstance(entry, ExpertRows)
        row = self._row(name, expert) if owner == self._rank else entry.rows.new_empty(self.shapes[name])
        if owner != writer and self._rank == owner:
            send(row, self.group, writer)
        elif owner != writer and self._rank == writer:
            recv(row, self.group, owner)
        return row

    def _row(self, name: str, expert: int) -> Tensor:
        entry = self.entries[name]
        assert isinstance(entry, ExpertRows)
        return entry.from_expert(expert)[:1].detach()

    def _whole(self, name: str) -> Tensor:
        entry = self.entries[name]
        assert isinstance(entry, Tensor)
        return entry.full_tensor().detach() if isinstance(entry, DTensor) else entry.detach()

    def _metas(self, step: Conversion) -> Results:
        metas = {
            pattern: [torch.empty(self.shapes[n], dtype=self.entries[n].dtype, device="meta") for n in names]
            for pattern, names in step.sources.items()
        }
        return self._convert(step, metas)

    def _convert(self, step: Conversion, sources: Mapping[str, list[Tensor]]) -> Results:
        return step.run(sources, self.shapes, self.form.config)

    def _is_expert(self, name: str) -> bool:
        return isinstance(self.entries[name], ExpertRows)
