"""Memory of one device by kind, by stated formulas. W: weights of an expert; d: width of a token; T: tokens."""

from __future__ import annotations

from dataclasses import dataclass

from hecate.sim.cluster import Cluster
from hecate.sim.model import ModelShape
from hecate.sim.settings import FSDP, Settings

__all__ = ["Memory", "memory_of"]


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest device.

    Attributes:
        owned: weights that the device owns, in master dtype: its slots of the pool, its shard of the dense part.
        optimizer: its state for these.
        gradients: of these.
        copies: buffers of copies.
        copy_gradients: gradients of one layer's copies, on their way to the owners.
        gathered: what FSDP2 gathers: two blocks and the outermost weights.
        activations: what forward keeps for backward.
        exchange: rows on their way between devices, of one layer.
        fixed: what libraries take.
    """

    owned: int
    optimizer: int
    gradients: int
    copies: int
    copy_gradients: int
    gathered: int
    activations: int
    exchange: int
    fixed: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def memory_of(
    model: ModelShape, cluster: Cluster, settings: Settings, copies: int, imbalance: float, owned_experts: int
) -> Memory:
    """The memory of the fullest device.

    Args:
        model: what is trained.
        cluster: where.
        settings: how.
        copies: most copies of one layer on one device.
        imbalance: max/mean device load: the fullest device computes that many times the mean rows.
        owned_experts: most experts of one layer that one device owns.
    """
    precision, devices = settings.precision, cluster.devices
    slots = -(-model.num_layers * model.num_experts // devices)
    dense = -(-(model.num_layers * model.dense_weights + model.outer_weights) // devices)
    weights = slots * model.expert_weights + dense
    rows = int(settings.tokens * model.top_k * (1.0 if settings.policy == FSDP else imbalance))
    return Memory(
        owned=weights * precision.master_bytes,
        optimizer=weights * precision.master_bytes * precision.moments,
        gradients=weights * precision.master_bytes,
        copies=_copies(model, settings, copies, owned_experts),
        copy_gradients=copies * model.expert_weights * precision.reduce_bytes,
        gathered=_gathered(model, settings),
        activations=_activations(model, settings, rows),
        exchange=0 if settings.policy == FSDP or devices == 1 else 2 * rows * model.d_model * precision.param_bytes,
        fixed=cluster.fixed_memory,
    )


def _copies(model: ModelShape, settings: Settings, copies: int, owned: int) -> int:
    """Without re-materialization all layers' buffers live at once, with it two.

    A buffer has a row per copy; if compute and master dtype differ, also one per owned expert (docs/design.md, 3).
    """
    if settings.policy == FSDP:
        return 0
    precision = settings.precision
    rows = copies + (owned if precision.param_bytes != precision.master_bytes else 0)
    alive = min(2, model.num_layers) if settings.rematerialize else model.num_layers
    return alive * rows * model.expert_weights * precision.param_bytes


def _gathered(model: ModelShape, settings: Settings) -> int:
    experts = model.num_experts * model.expert_weights if settings.policy == FSDP else 0
    block = model.dense_weights + experts
    size = settings.precision.param_bytes + settings.precision.reduce_bytes
    return 2 * block * settings.precision.param_bytes + block * size // 2 + model.outer_weights * size


def _activations(model: ModelShape, settings: Settings, rows: int) -> int:
    """Per layer and token: its input (d). Of a layer that is not recomputed, or the one that is being recomputed: the
    norms' outputs and sums (6 d), query, key, value and attention output (4 h, h all heads' widths), and per (token,
    expert) row its input and output (2 d) and its hidden values (W / d: two of a plain MLP, three of a gated one). The
    logits in float32, and their gradient.
    """
    size, d = settings.precision.param_bytes, model.d_model
    hidden = model.expert_weights // d
    layer = settings.tokens * (6 * d + 4 * model.heads) * size + rows * (2 * d + hidden) * size
    inputs = settings.tokens * d * size
    logits = 2 * 4 * settings.tokens * (model.head_weights // d)
    if model.checkpoint:
        return model.num_layers * inputs + layer + logits
    return model.num_layers * (inputs + layer) + logits
