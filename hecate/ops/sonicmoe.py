"""Gated expert MLPs by SonicMoE (arXiv 2512.14080), if the user asks for it and it is installed.

It is loaded through transformers, which knows the package's releases: `transformers.integrations.sonicmoe`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hecate.ops.grouped import Groups

__all__ = ["check_sonicmoe", "gated_mlp"]

EPILOGUES = {"silu": "SWIGLU", "relu": "REGLU"}
"""Activation -> its name there."""


def check_sonicmoe(device_type: str, layers: Iterable[tuple[str, str | None, torch.dtype]]) -> None:
    """Check that SonicMoE can compute these layers here.

    Args:
        device_type: of the experts.
        layers: name, activation of the gated MLP (None: it is another computation), and dtype of compute.

    Raises:
        RuntimeError: it is not installed, or cannot run on this GPU.
        ValueError: it cannot compute a layer.
    """
    for name, activation, dtype in layers:
        if activation not in EPILOGUES:
            what = "is no plain gated MLP of transformers" if activation is None else f"has activation {activation}"
            raise ValueError(f'expert_gemm="sonicmoe": {name} {what}; it computes gated {" and ".join(EPILOGUES)} only')
        if dtype != torch.bfloat16:
            raise ValueError(f'expert_gemm="sonicmoe": {name} computes in {dtype}, must be torch.bfloat16')
    if device_type != "cuda":
        raise RuntimeError(f'expert_gemm="sonicmoe": it needs CUDA, the experts are on {device_type}')
    try:
        from transformers.integrations.sonicmoe import load_sonicmoe_kernel

        load_sonicmoe_kernel()
    except Exception as error:  # it raises many types for what is missing
        raise RuntimeError(f'expert_gemm="sonicmoe": {error}; use expert_gemm="torch"') from error


def gated_mlp(
    rows: Tensor,
    groups: Groups,
    activation: str,
    gate_up: Tensor,
    down: Tensor,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """`down[g] @ (act(gate[g] @ x) * (up[g] @ x))` for rows sorted by expert; differentiable.

    To SonicMoE each row is a token with one expert and a weight of 1.

    Args:
        rows: `[N, d]`, at least one.
        groups: their experts.
        activation: a key of `EPILOGUES`.
        gate_up: `[G, 2 f, d]`, the rows of the gate first.
        down: `[G, d, f]`.
        biases: `[G, 2 f]` and `[G, d]`.
    """
    from transformers.integrations.sonicmoe import load_sonicmoe_kernel

    kernel: Any = load_sonicmoe_kernel()
    sizes = torch.diff(groups.ends, prepend=groups.ends.new_zeros(1))
    experts = torch.arange(len(groups.sizes), dtype=torch.int32, device=rows.device)
    out, _ = kernel.moe_general_routing_inputs(
        rows,
        rows.new_ones(rows.shape[0]),
        torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device),
        torch.repeat_interleave(experts, sizes, output_size=rows.shape[0]),
        gate_up.permute(1, 2, 0),
        biases[0],
        down.permute(1, 2, 0),
        biases[1],
        E=len(groups.sizes),
        activation_type=getattr(kernel.activation_type_enum, EPILOGUES[activation]),
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        concat_layout=True,
        stream_id=None,
    )
    result: Tensor = out
    return result
