"""Load a folder in transformers' format into a model under FSSDP; each rank reads only the data it needs."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

from hecate.checkpoint.state import TrainingState
from hecate.names import first_names
from hecate.pretrained.check import checked, refuse_quantized
from hecate.pretrained.conversion import Format, steps_to_read
from hecate.pretrained.entries import shapes_of
from hecate.pretrained.files import WeightFiles
from hecate.pretrained.reading import Reading
from hecate.ranks.agree import agree

__all__ = ["load_pretrained"]


def load_pretrained(
    folder: Path, state: TrainingState, form: Format, needed: Set[str], names: Mapping[str, str]
) -> Format:
    """See `FSSDP.load_pretrained`.

    Args:
        folder: folder to read.
        state: training state of the model.
        form: file format of the model.
        needed: names without values yet, which the folder must have even if the model class lets them be missing.
        names: original name of each tensor to read -> its name in the model that the folder is of.

    Returns:
        The format that writes a folder with the same keys.
    """
    reading = agree(lambda: _planned(folder, state, form, needed, names))
    agree(lambda: _read(reading))
    return reading.writes


def _planned(folder: Path, state: TrainingState, form: Format, needed: Set[str], names: Mapping[str, str]) -> Reading:
    where = f"FSSDP.load_pretrained({str(folder)!r})"
    refuse_quantized(where, folder)
    files = WeightFiles(folder)
    entries = {names[name]: entry for name, entry in state.weights().items() if name in names}
    steps, unexpected, writes = steps_to_read(form, files.tensors, entries)
    reading = Reading(where, files, entries, shapes_of(entries), tuple(steps), writes)
    first = {names[name]: names.get(one, one) for name, one in first_names(state.model).items() if name in names}
    return checked(reading, unexpected, first, {names[name] for name in needed if name in names})


def _read(reading: Reading) -> None:
    for step in reading.steps:
        for local, value in reading.values(step):
            local.copy_(value)
