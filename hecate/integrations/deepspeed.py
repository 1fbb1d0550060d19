"""DeepSpeed for the dense part of a model under FSSDP: its engine with ZeRO-1 or ZeRO-2.

    engine = hecate.fully_shard(model, config=hecate.FSSDPConfig(dense="deepspeed"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    zero = hecate.integrations.deepspeed.initialize(engine, optimizer, "zero2.json")
    for tokens, targets in batches:
        zero.backward(zero(tokens, targets).loss)
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    engine.save("ckpt", optimizer)

See docs/deepspeed.md.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hecate.adapters.transformers import kept_in_float32
from hecate.api import FSSDP
from hecate.config import FSSDPConfig
from hecate.experts import POOL_PREFIX
from hecate.names import original_name
from hecate.ranks.agree import agree
from hecate.ranks.same import check_same
from hecate.runtime.dense.zero import ZeroDense
from hecate.text import listed

__all__ = ["initialize", "local_rank_of", "settings"]

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SECTIONS = {
    "optimizer": "pass a torch optimizer of all parameters",
    "scheduler": "make a scheduler of the optimizer that you pass",
    "torch_autocast": "set FSSDPConfig.param_dtype",
    "tensor_parallel": "tensor parallel training is not supported",
    "expert_parallel": "the experts are Hecate's",
    "hybrid_engine": "it is not supported",
}
"""Sections of a DeepSpeed config that must be absent, and what to do instead."""
OWN_FILES = "save_checkpoint", "load_checkpoint", "save_16bit_model"


def initialize(
    engine: FSSDP, optimizer: Optimizer, config: str | PathLike[str] | Mapping[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """Make the DeepSpeed engine that trains the dense part of the model. Collective.

    Call it once, before training or loading. The model needs its values: after building it on the meta device, call
    `engine.init_weights` or `engine.load_pretrained` first. From now on

    - call the result instead of the model, then its `backward(loss)`, or `loss.backward()`;
    - `optimizer.step()` steps DeepSpeed's optimizer too, of the same class and with the same settings as `optimizer`
      has for the dense parameters, also if a scheduler changes them;
    - `engine.clip_grad_norm_`, `engine.no_sync`, `engine.save` and `engine.load` work as with any other dense part.

    If DeepSpeed finds dense gradients that are not finite (it looks with float32 only), the step is skipped, also that
    of the experts.

    Args:
        engine: made with `FSSDPConfig(dense="deepspeed")`.
        optimizer: holds all trainable parameters of the model; it must update each element by itself, as Adam does.
        config: a DeepSpeed config, or the path of its JSON file, see `settings`.

    Raises:
        ValueError: a setting that does not fit, by name; on all ranks, before anything is changed.
    """
    dense = engine._parts.dense
    given = agree(lambda: settings(config, engine.config))
    check_same("deepspeed.initialize", {key: repr(value) for key, value in sorted(given.items())})
    agree(lambda: _check(engine, optimizer))
    assert isinstance(dense, ZeroDense)
    groups = [(group, dense_part) for group in optimizer.param_groups if (dense_part := _dense_group(group))["params"]]
    kind: Any = type(optimizer)  # its arguments are those of its groups
    own: Optimizer = kind([dense_part for _, dense_part in groups])
    with _without_pools(engine.model), local_rank_of(engine.device):
        zero, *_ = deepspeed.initialize(model=engine.model, optimizer=own, config=given, dist_init_required=False)
    pairs = zip(groups, own.param_groups, strict=True)
    dense.connect(zero, optimizer, own, [(group, mine) for (group, _), mine in pairs])
    for name in OWN_FILES:
        setattr(zero, name, _refuse(name))
    return zero


def settings(config: str | PathLike[str] | Mapping[str, Any], fssdp: FSSDPConfig) -> dict[str, Any]:
    """The config for DeepSpeed: the given one, with what follows from `fssdp` filled in.

    Raises:
        ValueError: a value that does not fit, by name.
    """
    given = copy.deepcopy(dict(config)) if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    zero, stage = given.get("zero_optimization", {}), given.get("zero_optimization", {}).get("stage", 0)
    bf16 = fssdp.param_dtype == torch.bfloat16
    for section, instead in SECTIONS.items():
        if _enabled(given.get(section)):
            _refused(section, given[section], f"must be absent: {instead}")
    if stage not in (1, 2):
        _refused("zero_optimization.stage", stage, "must be 1 or 2 (3 shards weights: use dense='fsdp')")
    for key in ("offload_optimizer", "offload_param", "zenflow"):
        if zero.get(key) is not None and zero[key].get("device", "") != "none":
            _refused(f"zero_optimization.{key}", zero[key], "is not supported")
    if _enabled(given.get("fp16")):
        _refused("fp16.enabled", True, "is not supported: loss scaling does not know of the experts; use bf16")
    if _enabled(given.setdefault("bf16", {"enabled": bf16})) != bf16:
        _refused("bf16.enabled", not bf16, f"must be {bf16} with FSSDPConfig.param_dtype={fssdp.param_dtype}")
    if given.get("gradient_clipping", 0) != 0:
        _refused("gradient_clipping", given["gradient_clipping"], "must be 0: call engine.clip_grad_norm_")
    if given.get("gradient_accumulation_steps", 1) != 1:
        _refused("gradient_accumulation_steps", given["gradient_accumulation_steps"], "must be 1: use engine.no_sync()")
    accumulated = given.get("data_types", {}).get("grad_accum_dtype")
    if bf16 and stage == 1 and accumulated in ("fp32", "float32"):
        _refused("data_types.grad_accum_dtype", accumulated, "with bf16 needs zero_optimization.stage 2")
    _fill_dtype(given, fssdp.reduce_dtype)
    if "train_batch_size" not in given:
        given.setdefault("train_micro_batch_size_per_gpu", 1)  # DeepSpeed wants one; it only reports with it
    return given


def _fill_dtype(given: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Gradients are sent in `FSSDPConfig.reduce_dtype`, if it is set."""
    if dtype is None:
        return
    wanted = DTYPES.get(dtype)
    if (sent := given.setdefault("communication_data_type", wanted)) != wanted:
        _refused("communication_data_type", sent, f"must fit FSSDPConfig.reduce_dtype={dtype}")


def _enabled(section: Any) -> bool:
    return bool(section.get("enabled", True) if isinstance(section, Mapping) else section)


def _refused(key: str, value: object, rule: str) -> NoReturn:
    raise ValueError(f"DeepSpeed config: {key}={value!r}: {rule}")


def _check(engine: FSSDP, optimizer: Optimizer) -> None:
    """ValueError if the engine, the model or the optimizer does not fit."""
    dense = engine._parts.dense
    if not isinstance(dense, ZeroDense):
        raise ValueError(f"FSSDPConfig.dense={engine.config.dense!r}: must be 'deepspeed'")
    if dense.connected:
        raise ValueError("deepspeed.initialize: it was called for this model already")
    engine._check_usable()
    parameters = {original_name(name): p for name, p in engine.model.named_parameters()}
    held = {p for group in optimizer.param_groups for p in group["params"]}
    missing = {name for name, p in parameters.items() if p.requires_grad and p not in held}
    if missing:
        raise ValueError(f"deepspeed.initialize: the optimizer lacks {listed(missing)}; it must hold all trained ones")
    own = {name: p for name, p in parameters.items() if not name.startswith(POOL_PREFIX)}
    if not any(p.requires_grad for p in own.values()):
        raise ValueError("deepspeed.initialize: all dense parameters are frozen; use dense='replicate'")
    wrong = {name for name, p in own.items() if p.is_floating_point() and p.dtype != torch.float32}
    if wrong:
        raise ValueError(
            f"dense='deepspeed': {listed(wrong)} are not float32, in which DeepSpeed keeps master weights; set "
            "FSSDPConfig.master_dtype=torch.float32"
        )
    if engine.config.param_dtype == torch.bfloat16 and (kept := kept_in_float32(engine.model)):
        names = {name for name, p in own.items() if p in kept}
        raise ValueError(f"dense='deepspeed': the model keeps {listed(names)} in float32, DeepSpeed would cast them")


def _dense_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with the dense parameters of `group` that are trained."""
    own = [p for p in group["params"] if p.requires_grad and not isinstance(p, DTensor)]
    return {**{key: value for key, value in group.items() if not key.startswith("hecate_")}, "params": own}


@contextmanager
def _without_pools(model: nn.Module) -> Iterator[None]:
    """Inside, the model has only its dense parameters: DeepSpeed casts, moves and broadcasts all that it finds."""
    pools = {name: p for name, p in model.named_parameters(recurse=False) if name.startswith(POOL_PREFIX)}
    for name in pools:
        delattr(model, name)
    try:
        yield
    finally:
        for name, parameter in pools.items():
            model.register_parameter(name, parameter)


@contextmanager
def local_rank_of(device: torch.device) -> Iterator[None]:
    """Inside, LOCAL_RANK is the number of `device`: DeepSpeed requires the variable and takes the GPU that it names."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index) if device.type == "cuda" else before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _refuse(name: str) -> Any:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"DeepSpeedEngine.{name} does not know of the experts; call save, load or save_pretrained of the engine "
            "that hecate.fully_shard returned"
        )

    return refuse
