"""What the simulator knows of a model: how many weights and bytes each of its parts has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hecate.sim.fields import check_integers, record_of

__all__ = ["ModelShape", "from_transformers", "read_model"]


@dataclass(frozen=True)
class ModelShape:
    """A Mixture-of-Experts transformer; all counts are of weights (elements), not bytes.

    Attributes:
        name: for tables.
        num_layers: MoE layers.
        d_model: width of a token.
        num_experts: routed experts per layer.
        top_k: experts per token.
        expert_weights: weights of one expert.
        dense_weights: weights per MoE layer that every token uses: attention, router, shared experts; those of layers
            without experts are divided among the MoE layers.
        outer_weights: input embedding, output head and the rest outside of layers.
        head_weights: of `outer_weights`, those that every token is multiplied with (the output head).
        heads: attention heads times head width, for the attention scores' operations and activations.
        sequence_length: tokens of a sequence.
        checkpoint: whether activations of a layer are recomputed in backward.
    """

    name: str
    num_layers: int
    d_model: int
    num_experts: int
    top_k: int
    expert_weights: int
    dense_weights: int
    outer_weights: int
    head_weights: int
    heads: int
    sequence_length: int
    checkpoint: bool

    def __post_init__(self) -> None:
        may_be_zero = ("outer_weights", "head_weights", "dense_weights")
        check_integers(f"model {self.name}", self, ("name", "checkpoint"), may_be_zero)
        if self.top_k > self.num_experts:
            raise ValueError(f"model {self.name}: top_k={self.top_k}, must be <= num_experts={self.num_experts}")

    @property
    def weights(self) -> int:
        """All weights."""
        return self.num_layers * (self.num_experts * self.expert_weights + self.dense_weights) + self.outer_weights

    def cut(self, layers: int) -> ModelShape:
        """The model with at most `layers` layers, and as large a share of what is outside of them."""
        layers = min(layers, self.num_layers)
        outer, head = (n * layers // self.num_layers for n in (self.outer_weights, self.head_weights))
        return replace(self, num_layers=layers, outer_weights=outer, head_weights=head)

    @property
    def dense_token_flops(self) -> int:
        """Forward operations per token of the non-MoE part before one MoE layer: weights, and causal attention."""
        return 2 * self.dense_weights + 2 * self.sequence_length * self.heads


def read_model(values: Mapping[str, Any], name: str) -> ModelShape:
    """The model that a file of conf/sim/model describes; ValueError lists what is missing or unknown."""
    return record_of(ModelShape, f"model {name}", values)


def from_transformers(source: str | Path | Any, sequence_length: int | None = None) -> ModelShape:
    """The shape of a transformers causal language model, counted on the meta device.

    Args:
        source: a config object, a folder with a config.json, or such a file.
        sequence_length: tokens of a sequence; None takes 4096, or the model's longest if that is less.

    Raises:
        ValueError: nothing to read there, or no MoE layers that an adapter knows, or layers that differ.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from hecate.adapters.base import find_experts

    config = _config(source) if isinstance(source, str | Path) else source
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = list(find_experts(model))
    kinds = {(f.spec.num_experts, sum(int(torch.Size(w.shape).numel()) for w in f.spec.weights)) for f in found}
    if len(kinds) != 1:
        raise ValueError(f"model {source}: its MoE layers have different experts: (number, weights) {sorted(kinds)}")
    ((experts, weights),) = kinds
    stacked = {id(getattr(f.module, w.kind)) for f in found for w in f.spec.weights}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rest = {id(p): p.numel() for p in model.parameters() if id(p) not in stacked}
    head = model.get_output_embeddings()
    head_weights = 0 if head is None else head.weight.numel()
    outer = sum(size for key, size in rest.items() if key in tables)
    outer += head_weights if head is not None and id(head.weight) not in tables else 0
    top_k = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_topk", None) or 2
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    longest = getattr(text, "max_position_embeddings", 4096) or 4096
    return ModelShape(
        name=type(config).__name__.removesuffix("Config"),
        num_layers=len(found),
        d_model=found[0].spec.width,
        num_experts=experts,
        top_k=int(top_k),
        expert_weights=weights,
        dense_weights=(sum(rest.values()) - outer) // len(found),
        outer_weights=outer,
        head_weights=head_weights,
        heads=text.num_attention_heads * width,
        sequence_length=sequence_length or min(4096, longest),
        checkpoint=True,
    )


def _config(source: str | Path) -> Any:
    from transformers import AutoConfig

    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model={source}: must be a folder with a config.json, or such a file")
    try:
        json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model={source}: {file} is not JSON: {error}") from error
    return AutoConfig.from_pretrained(file)
