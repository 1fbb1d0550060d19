"""Names without the wrappers that torch puts between modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hecate.names import original_modules, original_name


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("blocks.0.moe.up", "blocks.0.moe.up"),
        ("blocks.0._checkpoint_wrapped_module.moe.up", "blocks.0.moe.up"),
        ("_orig_mod.blocks.0._orig_mod._checkpoint_wrapped_module.up", "blocks.0.up"),
        ("_fsdp_wrapped_module.blocks.0", "blocks.0"),
        ("my_orig_mod.x", "my_orig_mod.x"),
        ("_orig_mod", ""),
        ("", ""),
    ],
)
def test_original_name(name: str, original: str) -> None:
    assert original_name(name) == original


def test_modules_are_those_inside_the_wrappers() -> None:
    inner, plain = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": torch.compile(checkpoint_wrapper(inner), backend="eager"), "b": plain})
    assert original_modules(model) == {"": model, "a": inner, "b": plain}
    compiled = torch.compile(model, backend="eager")
    assert original_modules(compiled) == {"": model, "a": inner, "b": plain}
