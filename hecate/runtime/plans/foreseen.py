"""Loads that are known before a step: checked, counted if routing is given, and equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecate.loads.counts import check_counts
from hecate.ranks.agree import agree, gather
from hecate.ranks.same import check_same, digest
from hecate.runtime.comms import Comms

__all__ = ["foreseen_counts"]

Int64 = NDArray[np.int64]


def foreseen_counts(counts: object, names: Sequence[str], experts: Sequence[int], comms: Comms) -> list[Int64]:
    """Per layer, int64 `[D, E]`, the same on all ranks that share the experts. Collective.

    Args:
        counts: see `FSSDP.foresee`.
        names: names of the MoE layers.
        experts: number of experts of each layer.
        comms: process groups of the ranks that share the experts.

    Raises:
        ValueError: see `FSSDP.foresee`; on all ranks.
    """
    devices = comms.topology.num_devices
    routing = isinstance(counts, list | tuple) and bool(counts) and all(isinstance(c, Tensor) for c in counts)
    check_same("FSSDP.foresee", {"what is passed": "routing" if routing else "counts"})
    if not routing:
        found = agree(lambda: _checked(counts, names, experts, devices))
        data = b"".join(layer.tobytes() for layer in found)
        check_same("FSSDP.foresee", {"counts": f"[sha256 {digest(data)[:16]}]"}, comms.tokens)
        return found
    rows = agree(lambda: _counted(counts, names, experts))
    every = [rows] if comms.tokens is None else gather(rows, comms.tokens)
    return [np.stack([row[layer] for row in every]) for layer in range(len(names))]


def _checked(counts: object, names: Sequence[str], experts: Sequence[int], devices: int) -> list[Int64]:
    """Counts `[layers, D, E]`, or one `[D, E]` per layer."""
    array = counts.cpu().numpy() if isinstance(counts, Tensor) else counts
    layers = list(array) if isinstance(array, list | tuple) or (isinstance(array, np.ndarray) and array.ndim) else []
    if not layers or not np.ndim(layers[0]):
        raise ValueError(f"FSSDP.foresee: counts={counts!r}: must be int [layers, num_devices, num_experts]")
    _check_layers(len(layers), len(names))
    found = []
    for name, layer, number in zip(names, layers, experts, strict=True):
        try:
            found.append(check_counts(layer, devices, number))
        except ValueError as error:
            raise ValueError(f"FSSDP.foresee: layer {name}: {error}") from error
    return found


def _counted(routing: object, names: Sequence[str], experts: Sequence[int]) -> list[Int64]:
    """Tokens of this rank per expert, int64 `[E]` per layer."""
    assert isinstance(routing, list | tuple)
    _check_layers(len(routing), len(names))
    return [_row(name, index, number) for name, index, number in zip(names, routing, experts, strict=True)]


def _row(name: str, index: Tensor, experts: int) -> Int64:
    if index.ndim != 2 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(
            f"FSSDP.foresee: layer {name}: routing has shape {tuple(index.shape)}, dtype {index.dtype}; must be "
            "integers [tokens, experts per token]"
        )
    flat = index.detach().flatten().cpu().numpy()
    if flat.size and not -1 <= flat.min() <= flat.max() < experts:
        raise ValueError(
            f"FSSDP.foresee: layer {name}: routing from {flat.min()} to {flat.max()}, must be in [0, {experts}), or -1 "
            "for no expert"
        )
    return np.bincount(flat[flat >= 0], minlength=experts).astype(np.int64)


def _check_layers(found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"FSSDP.foresee: loads of {found} layers, must be those of the model's {wanted} MoE layers")
