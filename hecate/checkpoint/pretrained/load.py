"""Read a folder as transformers writes it into a model under FSSDP, every rank what it owns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hecate.checkpoint.pretrained.conversion import Format, Results, Step, not_per_expert, steps_to_read
from hecate.checkpoint.pretrained.entries import first_names, local_part, shapes_of
from hecate.checkpoint.pretrained.files import DTYPES, TensorMeta, WeightFiles
from hecate.checkpoint.rows import ExpertRows
from hecate.checkpoint.state import Entry, TrainingState, listed
from hecate.collectives.ranks import agree

__all__ = ["load_pretrained"]


def load_pretrained(folder: Path, state: TrainingState, form: Format) -> Format:
    """See `FSSDP.load_pretrained`. Returns the format that writes such a folder."""
    plan = agree(lambda: _checked(folder, state, form))
    agree(lambda: _read_all(plan))
    return plan.writes


@dataclass(frozen=True)
class _Plan:
    """What is read into what.

    Attributes:
        where: the call, for errors.
        files: of the folder.
        entries: of the model.
        shapes: see `shapes_of`.
        steps: in the order of the files' keys.
        writes: the format that writes such files.
    """

    where: str
    files: WeightFiles
    entries: Mapping[str, Entry]
    shapes: Mapping[str, torch.Size]
    steps: tuple[Step, ...]
    writes: Format

    def values(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of the model on this device, its value on CPU) of all that `step` makes, an expert at a time."""
        target = self.entries[step.target]
        if isinstance(target, ExpertRows):
            for expert in target.experts.tolist():
                for name, value in self.convert(step, self._of_expert(step, expert)).items():
                    rows = self.entries[name]
                    assert isinstance(rows, ExpertRows)
                    yield rows.from_expert(expert)[:1], value
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

    def convert(self, step: Step, sources: Mapping[str, Sequence[Tensor]]) -> Results:
        """What `step` makes of sources by pattern, of experts as stacks of one."""
        return step.run(sources, self.shapes, self.writes.config)

    def _of_expert(self, step: Step, expert: int) -> dict[str, list[Tensor]]:
        """The sources of that expert only, by pattern; a stack of one of those that are stacked."""
        sources = {}
        for pattern, keys in step.sources.items():
            if pattern in step.by_expert:
                sources[pattern] = [self.files.read(keys[expert])]
            else:
                rest = (slice(0, n) for n in self.files.tensors[keys[0]].shape[1:])
                sources[pattern] = [self.files.read(keys[0], (slice(expert, expert + 1), *rest))]
        return sources


def _read_all(plan: _Plan) -> None:
    for step in plan.steps:
        for local, value in plan.values(step):
            local.copy_(value)


# Checks before anything is overwritten.


def _checked(folder: Path, state: TrainingState, form: Format) -> _Plan:
    """What is to be read, where it fits.

    Raises:
        ValueError: it does not; see `FSSDP.load_pretrained`.
    """
    where = f"FSSDP.load_pretrained({str(folder)!r})"
    _refuse_quantized(where, folder)
    files = WeightFiles(folder)
    entries = state.weights()
    steps, unexpected, writes = steps_to_read(form, files.tensors, entries)
    plan = _Plan(where, files, entries, shapes_of(entries), tuple(steps), writes)
    first = first_names(state.model)
    made: dict[str, Step] = {}
    again: list[tuple[Step, Step]] = []
    for step in steps:
        names = {first.get(name, name) for name in _dry_run(plan, step)}
        again += [(made[name], step) for name in names & made.keys()]
        made |= dict.fromkeys(names - made.keys(), step)
    _check_names(plan, made.keys(), unexpected, first)
    for one, other in again:
        _check_equal(plan, one, other)
    return replace(plan, steps=tuple(dict.fromkeys(made.values())))


def _refuse_quantized(where: str, folder: Path) -> None:
    config = folder / "config.json"
    quantized = json.loads(config.read_text()).get("quantization_config") if config.exists() else None
    if quantized is not None:
        raise ValueError(
            f"{where}: the weights are quantized ({quantized.get('quant_method')}); must be floating point: "
            "save them dequantized with transformers first"
        )


def _dry_run(plan: _Plan, step: Step) -> Iterable[str]:
    """Names of what `step` makes; ValueError where that does not fit the model."""
    target = plan.entries[step.target]
    by_expert = isinstance(target, ExpertRows)
    if by_expert:
        _check_experts(plan, step, target.shape[0])
    metas = {p: [_meta(plan, p, k, step, by_expert) for k in keys[: 1 if by_expert else None]] for p, keys in step.sources.items()}
    try:
        results = plan.convert(step, metas)
    except Exception as error:  # transformers' operations raise what they like
        raise ValueError(f"{plan.where}: {step.target} cannot be made of {listed(step.names)}: {error!r}") from error
    for name, value in results.items():
        _check_fits(plan, step, name, value, target)
    return results


def _meta(plan: _Plan, pattern: str, key: str, step: Step, by_expert: bool) -> Tensor:
    """A tensor like the one in the files, or a stack of one where it is stacked by expert, without memory."""
    shape = plan.files.tensors[key].shape
    return torch.empty((1, *shape[1:]) if by_expert and pattern not in step.by_expert else shape, device="meta")
