"""`FSSDPConfig`: all settings of FSSDP, in a frozen dataclass that validates them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import torch

from hecate.cost import CostModel

__all__ = ["ExpertGemm", "FSSDPConfig", "KernelChoice", "PolicyName", "Splits", "TokenHalves", "TransportChoice"]

PolicyName = Literal["balanced", "hecate", "ep", "fastermoe", "smartmoe", "flexmoe", "exact"]
Dense = Literal["fsdp", "replicate", "deepspeed", "none"]
Calibrate = Literal["pays", "always", False]
Pools = Literal["shared", "layer"]
KernelChoice = Literal["auto", "hecate", "torch"]
ExpertGemm = Literal["torch", "sonicmoe"]
TransportChoice = Literal["auto", "symmetric", "messages"]
Splits = Literal["host", "device"]
TokenHalves = Literal["auto", True, False]

LARGEST = 2**31 - 1
"""Largest value of settings that are counts: plans, arrays and queues cannot handle larger ones."""


@dataclass(frozen=True)
class FSSDPConfig:
    """Settings of `hecate.fully_shard`; all ranks must pass the same.

    Attributes:
        policy: decides which experts are copied and which change owners: "balanced" (Hecate's own), "hecate" (the
            paper's), "ep" (plain expert parallelism: none), or a system to compare with: "fastermoe" (after the gate,
            hot experts to every device if its own cost test says so), "smartmoe" (owners change every
            `reshard_interval` steps, no copies), "flexmoe" (every `reshard_interval` steps copies with optimizer state
            are added, removed and moved; they need equal `param_dtype` and `master_dtype`, and an optimizer of torch
            that updates each element by itself), "exact" (after the gate, as many copies as `max_imbalance` needs).
        max_imbalance: max/mean device load to plan for, >= 1.
        overlap_degree: experts per layer whose copies overlap with non-MoE work (the paper's t); "auto" computes it
            from `cost`.
        memory_slots: most copies that a device may hold per layer (the paper's m); "auto" takes what fits in
            `memory_share` of the free memory, at most 2. Memory is allocated for the copies that are made; with
            `rematerialize`, two buffers have room for all that a device may hold of one layer.
            "auto" is chosen in `fully_shard`, before optimizer state and gradients exist: their estimate, a gradient
            and two float32 moments per trained element of this device, is taken off first, and so are casts of owned
            experts if `param_dtype` is not `master_dtype`. Before each of the next three steps memory is measured
            again, and all ranks lower their slots if what is free then asks for it; they are never raised.
        memory_share: share of the free device memory that "auto" may fill with copies, in (0, 1]; the rest is for
            activations and gathered dense weights.
        rematerialize: release copies after forward and gather them again for backward. If experts compute in another
            dtype than their master weights have, each gather also casts the owned experts again, which without it is
            done once per step.
        calibrate: whether to gather further copies after the gate, when the true loads are known: "pays" (if the cost
            model predicts a gain; the policy "exact" does not ask it), "always", or False.
        reshard_interval: optimizer steps between re-shardings; 0 never re-shards. Off by default, because code outside
            of optimizers and `FSSDP` that refers to rows of pools must handle the change (`FSSDP.on_reshard`).
        load_window: steps of load history that copies are planned from (the paper's w).
        planning_threads: CPU threads of each process that plan copies and routes while the backward pass runs, at low
            priority on Linux; "auto" takes the process's share of the machine's cores, at most 4.
        cost: speed of links and compute: a cost model, the path of a profile file, or None for default numbers of the
            device type.
        master_dtype: dtype of owned parameters and optimizer state; None keeps the model's own.
        param_dtype: dtype that experts and dense part compute in, except weights that a transformers class keeps in
            float32 (`_keep_in_fp32_modules_strict`, e.g. some routers); None keeps `master_dtype`.
            Later micro-batches of a step compute with the casts of experts that the first one has made. Weights that
            were written in between are cast again, but a write that PyTorch does not count (through `.data`,
            `torch._foreach_*` or another tensor with the same memory) is only noticed if an optimizer's step, a pass
            without gradients or a change of the gradients goes with it. HECATE_DEBUG=1 finds all others.
        reduce_dtype: dtype that gradients are sent in; None takes `param_dtype`.
        wire_dtype: dtype in which tokens, their results and the gradients of both are sent between devices, at most as
            wide as `param_dtype`; None sends them as computed.
        pools: which owned experts are combined in one parameter: "shared" (those of all layers with equal weights; a
            device may own different numbers of experts of each layer) or "layer" (those of one layer, for optimizers
            that look at whole tensors and for settings per layer; all devices have equally many slots of each layer).
        kernels: what moves tokens, applies activations and packs weights: "hecate" (Hecate's CUDA kernels, compiled on
            first use through CuPy; on the CPU, their code for tests), "torch" (PyTorch's operations), or "auto": the
            kernels on CUDA if CuPy, the driver and the model's dtypes allow it on all ranks, else PyTorch's operations,
            and the log says why. `FSSDP.stats()` says which run.
        expert_gemm: what multiplies rows with experts' weights: "torch" (`torch.nn.functional.grouped_mm` where it
            can), or "sonicmoe" (SonicMoE, in bfloat16 on CUDA, for gated MLPs of transformers; an error if it is not
            installed).
        transport: what carries copies and gradients of experts: "symmetric" (ranks of one node read each other's
            memory: torch's symmetric memory on CUDA, files in RAM on the CPU for tests), "messages" (of the process
            group's backend, NCCL or gloo), or "auto": symmetric memory on CUDA if all ranks share one node, have peer
            access and can run Hecate's kernels, else messages, and the log says why. It is not the default, because it
            has not run on GPUs yet. `FSSDP.stats()` says which runs.
        splits: who divides a layer's tokens: "host" (it waits for the counts in every layer, once), or "device" (the
            quota and all offsets are computed there, and a layer that is trained waits for nothing; counts are read,
            and what is wrong with them raised, when the backward pass begins). "device" needs Hecate's kernels,
            calibrate=False, one dtype and widths for which torch multiplies all experts in one call, and on several
            devices `rows_per_pair`, the policy "balanced" or "ep", and for "balanced" another `param_dtype` than
            `master_dtype`. Passes without gradients wait as with "host". It has not run on GPUs yet.
        rows_per_pair: with splits="device" on several devices: rows that each device sends to each in one layer, used
            or not. A layer that needs more is an error when the backward pass begins; tokens of a device times experts
            per token are always enough.
        token_halves: whether a layer exchanges its tokens in two halves, each while experts compute the other: "auto"
            (if the cost model predicts that it saves time), True, or False. Outputs are the same; experts' gradients
            are sums over two products. The node-aware exchange and splits="device" have no halves.
        dense: how to train the rest of the model: "fsdp" (FSDP2), "replicate", "deepspeed" (ZeRO-1 or 2, by
            `hecate.integrations.deepspeed`), or "none" (left to the caller).
        seed: seed of initial values if no other is given.
    """

    policy: PolicyName = "balanced"
    max_imbalance: float = 1.02
    overlap_degree: int | Literal["auto"] = "auto"
    memory_slots: int | Literal["auto"] = "auto"
    memory_share: float = 0.2
    rematerialize: bool = False
    calibrate: Calibrate = "pays"
    reshard_interval: int = 0
    load_window: int = 5
    planning_threads: int | Literal["auto"] = "auto"
    cost: CostModel | str | None = None
    master_dtype: torch.dtype | None = None
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    wire_dtype: torch.dtype | None = None
    pools: Pools = "shared"
    kernels: KernelChoice = "auto"
    expert_gemm: ExpertGemm = "torch"
    transport: TransportChoice = "messages"
    splits: Splits = "host"
    rows_per_pair: int | None = None
    token_halves: TokenHalves = "auto"
    dense: Dense = "fsdp"
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("policy", self.policy, get_args(PolicyName))
        _one_of("pools", self.pools, get_args(Pools))
        _one_of("kernels", self.kernels, get_args(KernelChoice))
        _one_of("expert_gemm", self.expert_gemm, get_args(ExpertGemm))
        _one_of("transport", self.transport, get_args(TransportChoice))
        _one_of("splits", self.splits, get_args(Splits))
        _one_of("token_halves", self.token_halves, get_args(TokenHalves))
        _one_of("dense", self.dense, get_args(Dense))
        _one_of("calibrate", self.calibrate, get_args(Calibrate))
        _one_of("rematerialize", self.rematerialize, (True, False))
        if not (_is_number(self.max_imbalance) and 1 <= self.max_imbalance <= LARGEST):
            raise ValueError(
                f"FSSDPConfig.max_imbalance={self.max_imbalance!r}: must be a number >= 1 and <= {LARGEST}"
            )
        if not (_is_number(self.memory_share) and 0 < self.memory_share <= 1):
            raise ValueError(f"FSSDPConfig.memory_share={self.memory_share!r}: must be a number in (0, 1]")
        _count("reshard_interval", self.reshard_interval, 0)
        self._check_policy()
        self._check_splits()
        _count("load_window", self.load_window, 1)
        for name, least in (("overlap_degree", 0), ("memory_slots", 0), ("planning_threads", 1)):
            if getattr(self, name) != "auto":
                _count(name, getattr(self, name), least, ' or "auto"')
        if not _is_int(self.seed):
            raise ValueError(f"FSSDPConfig.seed={self.seed!r}: must be an integer")
        if not (self.cost is None or isinstance(self.cost, CostModel | str | os.PathLike)):
            raise ValueError(f"FSSDPConfig.cost={self.cost!r}: must be a CostModel, the path of a profile, or None")
        for name in ("master_dtype", "param_dtype", "reduce_dtype", "wire_dtype"):
            _float_dtype(name, getattr(self, name))

    def _check_policy(self) -> None:
        """ValueError if the policy cannot do anything under the other settings."""
        if self.policy in ("fastermoe", "exact") and self.calibrate is False:
            raise ValueError(
                f"FSSDPConfig.policy={self.policy!r} copies experts only after the gate, but calibrate=False forbids "
                "it; set calibrate to 'pays' or 'always'"
            )
        if self.policy == "flexmoe" and not (self.reshard_interval and self.memory_slots):
            raise ValueError(
                "FSSDPConfig.policy='flexmoe' changes which copies there are every reshard_interval steps, up to "
                f"memory_slots on a device, but reshard_interval={self.reshard_interval}, memory_slots="
                f"{self.memory_slots!r}; both must be at least 1"
            )
        if self.policy == "smartmoe" and not self.reshard_interval:
            raise ValueError(
                "FSSDPConfig.policy='smartmoe' only changes owners, every reshard_interval steps, but "
                "reshard_interval=0 means never; set it to at least 1"
            )

    def _check_splits(self) -> None:
        """ValueError if the host needs the counts under the other settings."""
        if self.rows_per_pair is not None:
            _count("rows_per_pair", self.rows_per_pair, 1)
        if self.splits == "host":
            if self.rows_per_pair is not None:
                raise ValueError(
                    f"FSSDPConfig.rows_per_pair={self.rows_per_pair} is for splits='device', not for 'host'; must be "
                    "None"
                )
            return
        for name, needed in (("calibrate", (False,)), ("expert_gemm", ("torch",)), ("policy", ("balanced", "ep"))):
            if (value := getattr(self, name)) not in needed:
                raise ValueError(
                    f"FSSDPConfig.splits='device' with {name}={value!r}: the host would need the counts; must be "
                    f"{' or '.join(map(repr, needed))}, or set splits='host'"
                )
        if self.token_halves is True:
            raise ValueError(
                "FSSDPConfig.splits='device' with token_halves=True: the host would need the counts to divide the "
                "rows; must be 'auto' or False, or set splits='host'"
            )
        if self.kernels == "torch":
            raise ValueError(
                "FSSDPConfig.splits='device' with kernels='torch': Hecate's kernels sort and move the tokens; must be "
                "'hecate' or 'auto', or set splits='host'"
            )

    def cost_model(self, device_type: str) -> CostModel:
        """The cost model: `cost` itself, or read from its file, or the default for "cpu" or an accelerator."""
        if isinstance(self.cost, CostModel):
            return self.cost
        if self.cost is not None:
            return CostModel.load(self.cost)
        return CostModel.cpu() if device_type == "cpu" else CostModel()


def _one_of(name: str, value: object, valid: tuple[object, ...]) -> None:
    if not any(value is v or (type(value) is type(v) and value == v) for v in valid):
        raise ValueError(f"FSSDPConfig.{name}={value!r}: must be one of {', '.join(map(repr, valid))}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(name: str, value: object, least: int, otherwise: str = "") -> None:
    if not (_is_int(value) and least <= value <= LARGEST):
        raise ValueError(f"FSSDPConfig.{name}={value!r}: must be an integer >= {least} and <= {LARGEST}{otherwise}")


def _float_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise ValueError(
            f"FSSDPConfig.{name}={dtype!r}: must be torch.float64, torch.float32 or torch.bfloat16 "
            "(torch.float16 would need a loss scaler that knows of all ranks)"
        )
