"""The settings of a simulation as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from hecate.config import FSSDPConfig

__all__ = ["FSDP", "Precision", "Settings"]

FSDP = "fsdp"
"""Not a policy: FSDP2 without expert parallelism, every device gathers all experts of a layer and keeps its tokens."""


@dataclass(frozen=True)
class Precision:
    """Bytes of one element.

    Attributes:
        param_bytes: of weights and tokens in compute and on links.
        master_bytes: of owned weights and their gradients.
        reduce_bytes: of gradients on links.
        moments: elements of optimizer state per weight, in `master_bytes` each: 2 for Adam.
    """

    param_bytes: int = 2
    master_bytes: int = 4
    reduce_bytes: int = 2
    moments: int = 2

    def __post_init__(self) -> None:
        for name in ("param_bytes", "master_bytes", "reduce_bytes"):
            if getattr(self, name) not in (1, 2, 4, 8):
                raise ValueError(f"precision.{name}={getattr(self, name)!r}: must be 1, 2, 4 or 8")
        _count("precision.moments", self.moments, 0)

    @property
    def state_bytes(self) -> int:
        """Bytes that move with a weight when its expert changes owners."""
        return self.master_bytes * (1 + self.moments)


@dataclass(frozen=True)
class Settings:
    """How a model is trained; names, meanings and rules are those of `hecate.FSSDPConfig` where it has them.

    Attributes:
        policy: one of Hecate's policies except "flexmoe", which is not simulated, or "fsdp".
        tokens: tokens of each device in a step.
        memory_slots, max_imbalance, overlap_degree, rematerialize, calibrate, reshard_interval, load_window: see
            `hecate.FSSDPConfig`.
        foreseen: whether loads are known before the step (`engine.foresee`).
        replicas: groups of devices that train together, each with all experts (HSDP); the cluster is one of them.
        precision: bytes of elements.
    """

    policy: str = "balanced"
    tokens: int = 4096
    memory_slots: int = 2
    max_imbalance: float = 1.02
    overlap_degree: int | Literal["auto"] = "auto"
    rematerialize: bool = False
    calibrate: Literal["pays", "always", False] = "pays"
    reshard_interval: int = 100
    load_window: int = 5
    foreseen: bool = False
    replicas: int = 1
    precision: Precision = field(default_factory=Precision)

    def __post_init__(self) -> None:
        _count("tokens", self.tokens, 1)
        _count("replicas", self.replicas, 1)
        if not isinstance(self.foreseen, bool):
            raise ValueError(f"foreseen={self.foreseen!r}: must be one of True, False")
        if self.memory_slots == "auto":
            raise ValueError("memory_slots='auto': must be an integer >= 0, there is no device whose memory is free")
        if self.policy == "flexmoe":
            raise ValueError(
                "policy='flexmoe': copies that stay, with optimizer state, are not simulated; must be another of "
                f"FSSDPConfig's policies, or {FSDP!r}"
            )
        shared = {f.name: getattr(self, f.name) for f in fields(FSSDPConfig) if hasattr(self, f.name)}
        try:
            FSSDPConfig(**shared | ({"policy": "ep"} if self.policy == FSDP else {}))
        except ValueError as error:
            raise ValueError(str(error).removeprefix("FSSDPConfig.")) from error


def _count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer >= {least}")
