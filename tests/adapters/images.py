"""Tiny models that read images beside text, and batches with and without images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

from tests.adapters.tiny import LINEAR_ATTENTION, SIZES

TEXT = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
VISION: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "image_size": 16,
}
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
TOKENS |= {"image_start_token_id": 62, "image_end_token_id": 63}

MODELS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "glm4v_moe": ({"rope_parameters": TEXT["rope_parameters"] | {"mrope_section": [1, 1, 0]}}, {}),
    "qwen3_vl_moe": ({}, {"deepstack_visual_indexes": [0]}),
    "qwen3_5_moe": (LINEAR_ATTENTION, {}),
}
"""Model type -> what its text and its vision config need beyond `TEXT` and `VISION`."""


def tiny_image_model(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights, and routers that decide clearly."""
    torch.manual_seed(0)
    text, vision = MODELS[model_type]
    config = CONFIG_MAPPING[model_type](text_config=TEXT | text, vision_config=VISION | vision, **TOKENS)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(20)
    return model


def batch_of(seed: int, with_image: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two sequences of 10 tokens; with an image, four of them are its patches."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 59, (2, 10), generator=generator)
    given = {"input_ids": tokens, "labels": tokens}
    if with_image:
        tokens[:, 1], tokens[:, 2:6], tokens[:, 6] = 62, 60, 63
        given["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator).to(dtype)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        given["mm_token_type_ids"] = (tokens == 60).long()
    return given
