"""Folders for a model with adapters of peft: those of its base model, and those that peft writes for the adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hecate.adapters.peft import base_model
from hecate.checkpoint.rows import ExpertRows
from hecate.checkpoint.state import TrainingState
from hecate.experts import Elsewhere
from hecate.pretrained.check import refuse_quantized
from hecate.pretrained.entries import local_part
from hecate.pretrained.files import INDEX, SINGLE, WeightFiles
from hecate.ranks.agree import agree
from hecate.text import listed

__all__ = ["first_values", "is_of_adapters", "load_adapters", "names_in_base"]

ADAPTERS = "adapter_model.safetensors"
"""peft's file of adapters."""
OF_BASE = "base_layer"
"""peft's name of the module that it wraps."""


def is_of_adapters(folder: Path) -> bool:
    """Whether peft has written adapters, and nothing else, to `folder`."""
    return (folder / ADAPTERS).exists() and not any((folder / name).exists() for name in (SINGLE, INDEX))


def names_in_base(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Original name of each weight that is not an adapter's -> its name in the base model without adapters."""
    base = base_model(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    found = {}
    for name in names:
        parts = name.removeprefix(prefix).split(".")
        if not any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            found[name] = ".".join(part for part in parts if part not in (OF_BASE, "original_module"))
    return found


def first_values(model: nn.Module, missing: Collection[str]) -> Callable[[nn.Module], None]:
    """A rule that gives adapters the values that peft gives them by default: B zeros, A uniform as `nn.Linear` does.

    Args:
        model: the model.
        missing: original names of the adapters without values.

    Raises:
        ValueError: an adapter was asked to begin with other values, or is none of LoRA's matrices A and B.
    """
    whole: Any = model
    for adapter, config in getattr(whole, "peft_config", {}).items():
        if getattr(config, "init_lora_weights", True) is not True:
            raise ValueError(
                f"load_pretrained: adapter {adapter!r} has no values yet, and init_lora_weights="
                f"{config.init_lora_weights!r} asks for others than the default True; load the folder that peft has "
                "written for it first"
            )
    if others := [name for name in missing if ".lora_A." not in name and ".lora_B." not in name]:
        raise ValueError(f"load_pretrained: {listed(others)} have no values; load a folder of peft's that has them")
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "lora_B")]
    uniform = {id(m) for layer in layers for m in layer.lora_A.values()}
    zeros = {id(m) for layer in layers for m in layer.lora_B.values()}

    def rule(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if id(module) in uniform:
                nn.init.uniform_(parameter, -(parameter.shape[-1] ** -0.5), parameter.shape[-1] ** -0.5)
            elif id(module) in zeros:
                nn.init.zeros_(parameter)

    return rule


@torch.no_grad()
def load_adapters(folder: Path, state: TrainingState, kept: Mapping[str, Elsewhere]) -> set[str]:
    """Read adapters that peft has written, on every rank. Collective.

    Args:
        folder: contains `ADAPTERS`.
        state: training state of the model.
        kept: adapters of experts by name, see `Elsewhere`.

    Returns:
        Original names of the tensors read.

    Raises:
        ValueError: names or shapes differ, or the model has no adapters or several; on all ranks, before anything is
            overwritten.
    """
    pairs = agree(lambda: dict(_pairs(folder, state, kept)))

    def write() -> None:
        entries = state.weights()
        for name, value in pairs.items():
            entry = entries[name]
            if isinstance(entry, ExpertRows):
                for expert in entry.experts.tolist():
                    entry.from_expert(expert)[:1].copy_(value[expert : expert + 1])
            else:
                local, index = local_part(entry)
                local.copy_(value[index])

    agree(write)
    return set(pairs)


def _pairs(folder: Path, state: TrainingState, kept: Mapping[str, Elsewhere]) -> Iterator[tuple[str, Tensor]]:
    where = f"FSSDP.load_pretrained({str(folder)!r})"
    refuse_quantized(where, folder)
    adapters = list(getattr(state.model, "peft_config", {}))
    if len(adapters) != 1:
        raise ValueError(f"{where}: it has adapters of peft, and the model has {adapters or 'none'}; must be one")
    entries, files = state.weights(), WeightFiles(folder, ADAPTERS)
    own = set(entries) - set(names_in_base(state.model, entries))
    keys = {name: _key(name, adapters[0]) for name in own}
    _check_names(where, keys, files.tensors)
    for name, key in keys.items():
        value = files.read(key)
        value = kept[name].stacked(value) if name in kept and value.ndim == 2 else value
        if value.shape != entries[name].shape:
            raise ValueError(
                f"{where}: {key} has shape {tuple(files.tensors[key].shape)}, as experts {tuple(value.shape)}, and "
                f"{tuple(entries[name].shape)} in the model; must be equal"
            )
        yield name, value


def _key(name: str, adapter: str) -> str:
    """The key of an adapter in peft's file, which does not name the adapter."""
    return ".".join(part for part in name.split(".") if part not in (adapter, "modules_to_save"))


def _check_names(where: str, keys: Mapping[str, str], found: Collection[str]) -> None:
    lacks, more = set(keys.values()) - set(found), set(found) - set(keys.values())
    parts = [f"lacks {listed(lacks)}"] if lacks else []
    parts += [f"has {listed(more)}, which the model does not know"] if more else []
    if parts:
        raise ValueError(f"{where}: the folder " + "; it ".join(parts))
