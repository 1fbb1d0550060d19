"""The command line's subject: a transformers causal language model from a folder or file, shrunk as asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hecate.text import listed

__all__ = ["random_batch", "read_settings", "shrunk", "subject"]


def read_settings(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words; values as JSON has them, else text. ValueError for a word without "=", or a key twice."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or key in settings:
            raise ValueError(f"{word!r}: must be key=value, each key once")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return settings


def subject(
    source: str, overrides: Mapping[str, Any], device: torch.device
) -> tuple[Callable[[], nn.Module], int, tuple[str, ...]]:
    """The model that the command line asks to verify.

    Args:
        source: a folder with a `config.json`, and perhaps weights, or such a file.
        overrides: values of the config to change.
        device: device of the models that are made.

    Returns:
        A function that makes the model, the size of its vocabulary, and notes for the report. Weights of the folder are
        read if nothing is overridden; otherwise they are random.

    Raises:
        ValueError: nothing to read there, or a key that the config does not have.
    """
    from transformers import AutoModelForCausalLM

    path = Path(source)
    config, said = shrunk(_read_config(path), overrides)
    has_weights = path.is_dir() and any(path.glob("*.safetensors*"))

    def make() -> nn.Module:
        read = has_weights and not overrides
        model: nn.Module = (AutoModelForCausalLM.from_pretrained if read else AutoModelForCausalLM.from_config)(
            path if read else config
        )
        return model.to(device)

    weights = "read from the folder" if has_weights and not overrides else "random"
    return make, config.get_text_config().vocab_size, (f"weights are {weights}", *said)


def shrunk(config: Any, overrides: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """The config with the values of `overrides`, and what was changed in words.

    If there are fewer layers than before, lists with one entry per layer are cut.
    """
    values = config.to_dict()
    overrides = {config.attribute_map.get(name, name): value for name, value in overrides.items()}
    if unknown := set(overrides) - set(values):
        raise ValueError(f"{listed(unknown)}: not in this {type(config).__name__}; it has {', '.join(sorted(values))}")
    said = [f"{name}={value} (was {values[name]})" for name, value in overrides.items()]
    before, layers = values.get("num_hidden_layers"), overrides.get("num_hidden_layers")
    if layers is not None and isinstance(before, int) and layers < before:
        for name, value in values.items():
            if isinstance(value, list) and len(value) == before and name not in overrides:
                values[name] = value[:layers]
                said.append(f"{name} cut to {layers} entries")
    return type(config).from_dict(values | overrides), tuple(said)


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig

    if not (path / "config.json" if path.is_dir() else path).is_file():
        raise ValueError(f"model={path}: must be a folder with a config.json, or such a file")
    return AutoConfig.from_pretrained(path)


def random_batch(vocab: int, batch: int, length: int) -> Callable[[int, int], dict[str, Tensor]]:
    """Batches of random tokens, int64 `[batch, length]`, as transformers' models take them."""

    def make(number: int, rank: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * rank + number)
        tokens = torch.randint(vocab, (batch, length), generator=generator)
        return {"input_ids": tokens, "labels": tokens}

    return make
