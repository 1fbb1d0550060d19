"""Reproducible initial values: a generator for each (seed, parameter name, expert), whatever the sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hecate.models.moe import Experts

__all__ = ["generator_for", "init_module", "init_parameter", "stacked_names"]


def generator_for(seed: int, name: str, expert: int | None = None) -> torch.Generator:
    """CPU generator for one parameter, or for one expert's row of a stacked one.

    Args:
        seed: of the model.
        name: the parameter's original qualified name, such as "blocks.0.moe.experts.up".
        expert: index in the first dimension of a stacked parameter; None for any other parameter.
    """
    key = f"{seed}:{name}" if expert is None else f"{seed}:{name}:{expert}"
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def init_parameter(name: str, tensor: Tensor, generator: torch.Generator, num_layers: int) -> None:
    """Fill one parameter (or one expert's matrix) of our models in place; `tensor` is on CPU.

    GPT-2's rule: normal with standard deviation 0.02, divided by sqrt(2 * num_layers) for the two matrices of a
    layer that write to the residual stream; norms start as the identity.
    """
    with torch.no_grad():
        if tensor.ndim == 1:
            tensor.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            return
        writes_residual = name.endswith(("experts.down", "attention.out.weight"))
        std = 0.02 / (2 * num_layers) ** 0.5 if writes_residual else 0.02
        # Drawn in float32 whatever the dtype, so that the values do not depend on it.
        tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


def stacked_names(module: nn.Module) -> Iterator[str]:
    """Qualified names of the stacked expert parameters in `module`."""
    for prefix, child in module.named_modules():
        if isinstance(child, Experts):
            yield from (f"{prefix}.{name}" for name in child.expert_weights)


def init_module(module: nn.Module, seed: int, num_layers: int) -> None:
    """Fill every parameter of an unsharded `module` in place."""
    stacked = set(stacked_names(module))
    for name, parameter in module.named_parameters():
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        if name in stacked:
            for expert, row in enumerate(values):
                init_parameter(name, row, generator_for(seed, name, expert), num_layers)
        else:
            init_parameter(name, values, generator_for(seed, name), num_layers)
        with torch.no_grad():
            parameter.copy_(values)
