"""Redirect the model's own `save_pretrained`, which cannot handle pools and shards, to `FSSDP.save_pretrained`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from os import PathLike
from typing import Any

from torch import Tensor, nn

from hecate.pretrained.conversion import Format
from hecate.ranks.agree import agree, on_rank_0

__all__ = ["save_through"]

UNDERSTOOD = {"save_directory", "max_shard_size", "is_main_process", "state_dict", "token", "safe_serialization"}
"""Arguments of `save_pretrained` that are either respected or do not change what is written."""

Save = Callable[[str | PathLike[str], int | str], None]


def save_through(
    model: nn.Module, form: Format, sharded: bool, save: Save, full_state: Callable[[], dict[str, Tensor]]
) -> None:
    """Replace `model.save_pretrained`, if the model has one, by a collective function with the same signature.

    A call with `state_dict=` still runs the model's own method and may be made on one rank. Without it, a transformers
    model is written by `save`; for a model with adapters (peft), rank 0 writes only the adapters, from `full_state`.

    Args:
        model: model under FSSDP.
        form: file format of the model.
        sharded: whether each rank holds only a part of the model's tensors.
        save: `FSSDP.save_pretrained`.
        full_state: `FSSDP.full_state_dict`.
    """
    own = getattr(model, "save_pretrained", None)
    if not callable(own):
        return
    signature = inspect.signature(own)

    @wraps(own)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        arguments = _by_name(signature, args, kwargs)
        if arguments.get("state_dict") is not None:
            return own(*args, **kwargs)
        if hasattr(model, "peft_config"):
            state = full_state()
            return agree(lambda: on_rank_0(lambda: own(**arguments | {"state_dict": state})))
        if form.config is None and not sharded:
            return own(*args, **kwargs)
        if form.config is None:
            raise ValueError(
                f"{type(model).__name__}.save_pretrained would write what this rank has; call engine.save_pretrained"
                "(folder), or pass it state_dict=engine.full_state_dict()"
            )
        _refuse(signature, arguments)
        return save(arguments["save_directory"], arguments["max_shard_size"])

    model.save_pretrained = save_pretrained  # type: ignore[assignment]


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, including defaults; TypeError if the call itself would raise it."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    further = [name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]
    arguments = dict(bound.arguments)
    for name in further:
        arguments |= arguments.pop(name)
    return arguments


def _refuse(signature: inspect.Signature, arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments that ask for anything other than what the engine writes."""
    for name, value in arguments.items():
        default = signature.parameters[name].default if name in signature.parameters else None
        if name not in UNDERSTOOD and value != default:
            raise ValueError(
                f"model.save_pretrained({name}={value!r}): not supported under hecate.fully_shard; leave it out, or "
                "call it on one rank with state_dict=engine.full_state_dict()"
            )
