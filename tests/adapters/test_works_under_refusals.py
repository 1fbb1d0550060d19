"""What is refused with an error before anything hangs: other parallelism, fp16, models whose experts do not fit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import hecate
from tests.adapters.parity import batch
from tests.adapters.tiny import SIZES, tiny_model
from tests.adapters.ways import error_of, loss_of
from tests.workers import Groups

TEXT = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
TEXT |= {name: SIZES[name] for name in ("num_attention_heads", "pad_token_id", "bos_token_id", "eos_token_id")}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4, "num_experts": 4}
DBRX: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64}
DBRX |= {
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
}
NLLB = {"vocab_size": 64, "d_model": 32, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
NLLB |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}


@pytest.mark.parametrize(
    ("model_type", "config", "look_alike"),
    [
        (
            "llama4_text",
            TEXT | {"intermediate_size_mlp": 32},
            "model.layers.0.feed_forward.experts (Llama4TextExperts",
        ),
        ("dbrx", DBRX, "transformer.blocks.0.ffn.experts (DbrxExperts"),
        ("jetmoe", TEXT, "model.layers.0.mlp.input_linear (JetMoeParallelExperts"),
        ("switch_transformers", T5, "decoder.block.1.layer.2.mlp.experts (SwitchTransformersExperts"),
        ("nllb-moe", NLLB, "model.encoder.layers.0.ffn.experts (NllbMoeExperts"),
        ("doge", TEXT | {"is_moe": True, "num_experts": 4}, "model.layers.0.mlp (DogeCDMoE"),
        ("llama", TEXT, ""),
    ],
)
def test_models_that_do_not_fit(model_type: str, config: dict[str, Any], look_alike: str) -> None:
    auto = AutoModelForSeq2SeqLM if model_type in ("switch_transformers", "nllb-moe") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(CONFIG_MAPPING[model_type](**config))
    message = error_of(lambda: hecate.fully_shard(model))
    assert "has no MoE layer that fits: no submodule has `expert_weights` and `expert_mlp`" in message
    assert "has_gate, has_bias, is_transposed, has_post_expert_norm" in message
    assert ("what looks like one is" in message) == bool(look_alike)
    assert look_alike in message


def test_fp16() -> None:
    model = tiny_model("mixtral")
    assert "use bfloat16" in error_of(lambda: hecate.fully_shard(tiny_model("mixtral").half()))
    hecate.fully_shard(model)
    with torch.autocast("cpu", torch.float16):
        message = error_of(lambda: loss_of(model, batch(0, 0)))
    assert "model.layers.0.mlp.experts: autocast with torch.float16 needs a loss scaler" in message


def meshes() -> list[str]:
    """Errors of meshes with dimensions that are not ours."""
    names = [("replicate", "tp"), ("pp", "shard"), ("context", "shard"), ("replicate", "sp")]
    made = [init_device_mesh("cpu", (1, 2), mesh_dim_names=n) for n in names]
    made += [init_device_mesh("cpu", (2, 1), mesh_dim_names=("stage", "shard"))["shard"]]
    return [error_of(lambda mesh=mesh: hecate.fully_shard(tiny_model("mixtral"), mesh)) for mesh in made]  # type: ignore[misc]


def test_other_parallel_dimensions_of_a_mesh(groups: Groups) -> None:
    for messages in groups(2).run(meshes):
        for kind, message in zip(("tensor", "pipeline", "context", "sequence"), messages, strict=False):
            assert f"{kind} parallel training is not supported; the mesh must be (shard,)" in message
        assert "the mesh has 1 devices, the process group 2 ranks" in messages[-1]
        assert "tensor, pipeline and context parallel training beside it are not supported" in messages[-1]


def tensor_parallel() -> list[str]:
    """Only rank 0's model is tensor parallel; all ranks must raise."""
    models = [tiny_model("mixtral") for _ in range(2)]
    if dist.get_rank() == 0:
        models[0]._tp_size = 2  # as a tp_plan leaves it
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    weight = models[1].lm_head.weight
    models[1].lm_head.weight = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    return [error_of(lambda model=model: hecate.fully_shard(model)) for model in models]  # type: ignore[misc]


def test_tensor_parallel_models(groups: Groups) -> None:
    for by_size, by_tensor in groups(2).run(tensor_parallel):
        assert "MixtralForCausalLM was loaded with tp_size=2: tensor parallel training is not supported" in by_size
        assert "parameter lm_head.weight is sharded already" in by_tensor
        assert "(tensor parallel ones are not supported)" in by_tensor


def optimizers_of_whole_tensors() -> list[str]:
    engine = hecate.fully_shard(tiny_model("mixtral"), None, hecate.FSSDPConfig(dense="replicate"))
    made = [torch.optim.Adafactor(engine.model.parameters()), transformers.Adafactor(engine.model.parameters())]
    loss_of(engine.model, batch(0, dist.get_rank())).backward()
    return [error_of(optimizer.step) for optimizer in made]  # type: ignore[arg-type]


def test_optimizers_of_whole_tensors(groups: Groups) -> None:
    for of_torch, of_transformers in groups(2).run(optimizers_of_whole_tensors):
        assert of_torch.startswith("ValueError: torch.optim.Adafactor scales updates by norms of whole")
        assert of_transformers.startswith("ValueError: transformers.optimization.Adafactor scales")


def expert_parallel() -> str:
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True  # as an ep_plan leaves it
    return error_of(lambda: hecate.fully_shard(model))


def test_experts_that_transformers_has_split() -> None:
    assert "model.layers.1.mlp.experts: transformers holds only a part of its experts here" in expert_parallel()


def test_weights_of_another_shape_than_indices_are_refused() -> None:
    """As hunyuan_v1_moe's in transformers 5.0: a weight for each expert of the layer."""
    engine = hecate.fully_shard(model := tiny_model("mixtral"))
    experts = model.model.layers[0].mlp.experts
    message = error_of(lambda: experts(torch.zeros(4, 32), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 8)))
    assert "model.layers.0.mlp.experts: the router gave top_k_index [4, 2] and top_k_weights [4, 8]" in message
    engine.close()


def _otherwise(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same call of experts, with int32 indices, and column after column in memory."""
    hidden, index, weights = args
    return hidden, index.int().t().contiguous().t(), weights.t().contiguous().t()


def test_indices_of_other_kinds() -> None:
    """Any integers serve, in any memory layout; what is not `[tokens, k]` is named."""
    engine = hecate.fully_shard(model := tiny_model("mixtral"))
    experts = model.model.layers[0].mlp.experts
    gradients = []
    for hook in (lambda module, args: args, _otherwise):
        with experts.register_forward_pre_hook(hook):
            loss_of(model, batch(0, 0)).backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    hidden, index, weights = torch.ones(4, 32), torch.tensor([[0, 1], [5, -1], [2, 3], [7, 0]]), torch.ones(4, 2)
    for wrong in (index.float(), index > 1):
        message = error_of(partial(experts, hidden, wrong, weights))
        assert f"experts: top_k_index is {wrong.dtype}; must be the integer ids of experts" in message
    called = "model.layers.0.mlp.experts was called with hidden_states {} and top_k_index {}; must be [tokens, width]"
    assert called.format([1, 4, 32], [4, 2]) in error_of(lambda: experts(hidden[None], index, weights))
    assert called.format([4, 32], [3, 2]) in error_of(lambda: experts(hidden, index[1:], weights[1:]))
    assert called.format([4, 32], [4]) in error_of(lambda: experts(hidden, index[:, 0], weights[:, 0]))
    assert called.format([4, 32], [4, 0]) in error_of(lambda: experts(hidden, index[:, :0], weights[:, :0]))
    engine.close()
