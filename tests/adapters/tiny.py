"""Tiny random models of transformers' architectures, made from their config classes: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, PreTrainedModel, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Set where a config class has the attribute."""

LATENT_ATTENTION = {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED_ATTENTION = {**LATENT_ATTENTION, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
LINEAR_ATTENTION = {
    **MIXED,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
RELATIVE_ATTENTION = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "unpadded_vocab_size": 64,
}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": LATENT_ATTENTION,
    "axk2": LATENT_ATTENTION,
    "bailing_hybrid": {**LATENT_ATTENTION, **MIXED},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "cohere2_moe": {},
    "deepseek_v2": LATENT_ATTENTION,
    "deepseek_v3": LATENT_ATTENTION,
    "deepseek_v32": INDEXED_ATTENTION,
    "deepseek_v4": {},
    "dots3_note_text": {
        **INDEXED_ATTENTION,
        "layer_types": ["indexed_attention", "indexed_attention"],
        "use_sliding_window": False,
        "shared_experts_intermediate_size": 16,
    },
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"num_hidden_layers": 3},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT_ATTENTION,
    "glm_moe_dsa": INDEXED_ATTENTION,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"],
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": INDEXED_ATTENTION,
    "inkling_text": RELATIVE_ATTENTION,
    "inkling2_text": {**RELATIVE_ATTENTION, "n_layers_per_attn_res_block": 1},
    "inkling2_loop_text": {
        **RELATIVE_ATTENTION,
        "n_layers_per_attn_res_block": 1,
        "num_hidden_layers": 3,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**LATENT_ATTENTION, "linear_head_dim": 8, "linear_num_heads": 4, **MIXED},
    "kolibri1": {},
    "laguna": {},
    "lara_mini": LINEAR_ATTENTION,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "nemotron_h": {
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "qwen3_moe": {},
    "qwen3_next": LINEAR_ATTENTION,
    "qwen4_exp_text": {
        **LINEAR_ATTENTION,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
}
"""model_type of a config class -> what it needs beyond `SIZES`."""


def known(model_types: Iterable[str], often: Iterable[str]) -> list[Any]:
    """Parameters of a test: those not in `often` are long, those that this transformers lacks are skipped."""
    return [
        pytest.param(model_type, marks=[skip_unknown(model_type), *([] if model_type in often else [pytest.mark.long])])
        for model_type in model_types
    ]


ROUTER = "its router gives a weight for each expert of the layer, not for each choice"
LIMITED = {"hunyuan_v1_moe": ("5.1", ROUTER), "phimoe": ("5.1", ROUTER)}
"""Model type -> the first version whose class works, and what the class of earlier ones does. Both are refused."""


def skip_unknown(model_type: str) -> pytest.MarkDecorator:
    """Skips if an older version has no such class, or one that does not follow the experts interface yet."""
    version = Version(__version__)
    works_from, reason = LIMITED.get(model_type, ("5.0", ""))
    if version < Version(works_from):
        return pytest.mark.skip(reason=f"{model_type} of transformers {__version__}: {reason}")
    lacks = version < Version("5.21") and not _follows_interface(model_type)
    return pytest.mark.skipif(lacks, reason=f"transformers {__version__} lacks {model_type}, or its experts interface")


@cache
def _follows_interface(model_type: str) -> bool:
    if model_type not in CONFIG_MAPPING:
        return False
    with torch.device("meta"):
        return any(hasattr(module, "is_transposed") for module in tiny_model(model_type).modules())


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The config class of `model_type` with `SIZES`, what it needs, and `changes`."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    sizes = {name: value for name, value in SIZES.items() if _has(default, name)}
    return cls(**(sizes | dict(ARCHITECTURES[model_type]) | changes))


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # it has one a layer, and takes one for all
        return True


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A causal language model of that architecture with random weights, some in float32 if its class keeps them so."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=dtype)
