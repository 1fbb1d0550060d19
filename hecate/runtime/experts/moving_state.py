"""Finds the optimizer state that must move with experts; state that cannot move is refused before any row moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from hecate.ranks.agree import agree, gather
from hecate.ranks.same import check_equal
from hecate.runtime.experts.optimizer_states import OptimizerStates
from hecate.runtime.experts.pool import ExpertPool
from hecate.values.local import local_tensor

__all__ = ["MovingState"]

Rows = dict[str, Tensor]
"""Name of the parameter and key of its state -> tensor with one row per slot."""


class MovingState:
    """State of all optimizers that hold parameters of pools.

    This includes wrappers as well as the optimizers they wrap; several optimizers may hold parameters of one pool.

    Args:
        pools: the pools whose rows move.
        states: keeps the list of optimizers.
    """

    def __init__(self, pools: Sequence[ExpertPool], states: OptimizerStates) -> None:
        self._pools = tuple(pools)
        self._states = states

    def check(self) -> None:
        """Raise as `tensors` does if some state cannot move. Collective."""
        self._found()

    def tensors(self, pool: ExpertPool) -> list[Tensor]:
        """Optimizer state tensors of `pool` on this rank. Collective.

        Returns:
            Tensors `[slots, ...]`; the same number, shapes and order on all ranks.

        Raises:
            ValueError: there is state that cannot be moved, because it is not one row per slot; on all ranks.
        """
        own = {id(p) for p in pool.parameters.values()}
        values = [value for rows in self._found() for home, value in rows.values() if home in own]
        # A wrapper may have the very state of the optimizer inside of it.
        return [local_tensor(value) for value in {id(value): value for value in values}.values()]

    def _found(self) -> list[dict[str, tuple[int, Tensor]]]:
        """Per optimizer that is alive on all ranks: parameter's name and key -> id of the parameter, and the tensor."""
        found = agree(lambda: {n: dict(self._rows(o)) for n, o in self._states.optimizers()})
        described = {
            n: {key: (tuple(t.shape), str(t.dtype)) for key, (_, t) in rows.items()} for n, rows in found.items()
        }
        everyone = gather(described)
        alive = sorted(set.intersection(*(set(other) for other in everyone)))
        for number in alive:  # a dropped optimizer may still exist on ranks that have not collected garbage yet
            check_equal("re-sharding: optimizer state", [other[number] for other in everyone], "have the same state")
        return [found[number] for number in alive]

    def _rows(self, optimizer: Optimizer) -> Iterator[tuple[str, tuple[int, Tensor]]]:
        for parameter, state in optimizer.state.items():
            home = self._states.home_of(parameter)
            if not isinstance(state, Mapping):
                raise ValueError(_refusal(optimizer, "state", "is not kept per parameter"))
            for key, value in sorted(state.items()):
                if home is None:
                    _check_other(optimizer, parameter, key, value)
                elif _has_rows(optimizer, f"{key} of {home[0]}", value, home[1]):
                    yield f"{home[0]} {key}", (id(parameter), value)


def _has_rows(optimizer: Optimizer, what: str, value: object, pool: ExpertPool) -> bool:
    """Whether `value` is a tensor with one row per slot; ValueError if it may depend on experts in another way."""
    if isinstance(value, Tensor):
        local = local_tensor(value)
        if local.ndim == 0 or local.numel() == 1:
            return False
        if local.shape[0] == pool.slots:
            return True
        rule = f"has local shape {tuple(local.shape)}; its first dimension must be the {pool.slots} slots of a device"
        raise ValueError(_refusal(optimizer, what, rule))
    if _has_tensors(value):
        raise ValueError(_refusal(optimizer, what, f"is a {type(value).__name__} of tensors"))
    return False


def _check_other(optimizer: Optimizer, parameter: object, key: str, value: object) -> None:
    """ValueError if the state of a parameter outside of pools spans several parameters, as that of L-BFGS does."""
    size = parameter.numel() if isinstance(parameter, Tensor) else 0
    if isinstance(value, Tensor) and value.numel() > max(size, 1):
        raise ValueError(_refusal(optimizer, key, f"has {value.numel()} elements, its parameter {size}"))
    if not isinstance(value, Tensor) and _has_tensors(value):
        raise ValueError(_refusal(optimizer, key, f"is a {type(value).__name__} of tensors"))


def _has_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(v) for v in value.values())
    if isinstance(value, Iterable) and not isinstance(value, str | Tensor):
        return any(_has_tensors(v) for v in value)
    return isinstance(value, Tensor)


def _refusal(optimizer: Optimizer, what: str, rule: str) -> str:
    return (
        f"re-sharding moves experts with their optimizer state, but {what} of {type(optimizer).__name__} {rule}, so it "
        "would stay behind; set FSSDPConfig.reshard_interval=0"
    )
