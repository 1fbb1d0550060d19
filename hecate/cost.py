"""The cost model of links and compute: given numbers or a profile file (paper, section 4.2).

It uses only integers (nanoseconds, bytes, tokens) and measures nothing during a run, so that every rank computes the
same plan from it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

__all__ = ["CostModel", "LayerCost"]


@dataclass(frozen=True)
class CostModel:
    """Speed of a device and its links. The defaults describe H100 nodes with 400 Gbit/s between nodes.

    Attributes:
        intra_node_bandwidth: bytes per second, per device and direction, within a node.
        inter_node_bandwidth: bytes per second, per device and direction, between nodes.
        message_ns: fixed cost of one message in nanoseconds.
        flops: floating-point operations per second that matrix products reach on one device.
        hidden_permille: share of the non-MoE time with which copies can overlap, in 1/1000. 0: no overlap (on CPU the
            same cores compute and copy), so every copy must save more time than it costs. Below 500 the policy
            "balanced" makes no copies early, because it needs fewer of them once loads are known.
    """

    intra_node_bandwidth: int = 300_000_000_000
    inter_node_bandwidth: int = 45_000_000_000
    message_ns: int = 10_000
    flops: int = 400_000_000_000_000
    hidden_permille: int = 800

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("message_ns", "hidden_permille") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"CostModel.{f.name}={value!r}: must be an integer >= {least}")
        if self.hidden_permille > 1000:
            raise ValueError(f"CostModel.hidden_permille={self.hidden_permille}: must be <= 1000")

    @classmethod
    def cpu(cls) -> CostModel:
        """Default numbers for processes on one machine that communicate through gloo."""
        return cls(
            intra_node_bandwidth=1_500_000_000,
            inter_node_bandwidth=1_000_000_000,
            message_ns=100_000,
            flops=60_000_000_000,
            hidden_permille=0,
        )

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read a JSON object with exactly the attributes above, or a profile of `hecate.sim.measure`, which has one.

        Raises:
            ValueError: it is no JSON object, or a key is missing, unknown or out of range.
        """
        try:
            values = json.loads(Path(path).read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cost profile {path}: not JSON ({error})") from error
        if isinstance(values, dict) and isinstance(values.get("cost"), dict):
            values = values["cost"]
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            keys = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"cost profile {path}: keys {keys}, must be exactly {sorted(names)}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write a profile that `load` can read."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def transfer_ns(self, num_bytes: int, crosses_node: bool) -> int:
        """Nanoseconds that one message of `num_bytes` takes if nothing else uses the link."""
        bandwidth = self.inter_node_bandwidth if crosses_node else self.intra_node_bandwidth
        return self.message_ns + num_bytes * 1_000_000_000 // bandwidth

    def compute_ns(self, flops: int) -> int:
        """Nanoseconds that `flops` floating-point operations take on one device."""
        return flops * 1_000_000_000 // self.flops


@dataclass(frozen=True)
class LayerCost:
    """Costs of one MoE layer, all integers.

    Attributes:
        model: speed of links and devices.
        expert_bytes: bytes sent per copy of an expert, in `param_dtype`.
        gradient_bytes: bytes sent per gradient of an expert, in `reduce_dtype`.
        token_flops: forward and backward floating-point operations per (token, expert) pair.
        token_bytes: bytes sent per hidden state.
        dense_token_flops: forward floating-point operations of the non-MoE part before this layer, per token.
    """

    model: CostModel
    expert_bytes: int
    gradient_bytes: int
    token_flops: int
    token_bytes: int
    dense_token_flops: int

    def hidden_ns(self, tokens: int) -> int:
        """Nanoseconds of forward non-MoE work that can overlap with copies, for `tokens` tokens on each device."""
        return self.model.compute_ns(self.dense_token_flops * tokens) * self.model.hidden_permille // 1000

    def overlap_degree(self, tokens: int, crosses_node: bool, links: int = 1) -> int:
        """The paper's t: experts whose copies overlap fully, `T_nonMoE * bw / expert_bytes` (Algorithm 1).

        With `links`, those that as many devices together can send.
        """
        bandwidth = self.model.inter_node_bandwidth if crosses_node else self.model.intra_node_bandwidth
        return self.hidden_ns(tokens) * bandwidth * links // (self.expert_bytes * 1_000_000_000)

    @property
    def copy_tokens(self) -> int:
        """Tokens whose way to another device and back, forward and backward, takes as many bytes as a copy's."""
        return -(-(self.expert_bytes + self.gradient_bytes) // (4 * self.token_bytes))

    def token_ns(self, tokens: int) -> int:
        """Nanoseconds of expert compute, forward and backward, for `tokens` (token, expert) pairs on one device."""
        return self.model.compute_ns(self.token_flops * tokens)
