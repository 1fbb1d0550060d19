"""Finds weights, losses and gradients that are not finite, by original name and expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hecate.experts import OwnedExperts
from hecate.names import original_name
from hecate.ranks.agree import gather
from hecate.values.local import local_tensor

__all__ = ["non_finite"]

WHOLE = -1
"""Stands for an expert id if a tensor belongs to the dense part."""

Place = tuple[str, int]
"""Original name, and expert or `WHOLE`."""


def non_finite(
    model: nn.Module, experts: Sequence[OwnedExperts], names: Sequence[str], loss: Tensor | None = None
) -> list[str]:
    """Names of what is NaN or infinite on any rank; the same list on all ranks. Collective; waits for the device.

    It reads all parameters, buffers and gradients, so call it only after a loss or norm was not finite.

    Args:
        model: the model, for its dense parameters and buffers.
        experts: its stacked weights in pools.
        names: original names in the model's order.
        loss: loss of this rank, any shape; None leaves it out.

    Returns:
        Weights and buffers ("a.b.experts.up, expert 3"), then losses ("loss of rank 1"), then gradients ("gradient of
        ...") from the last layer to the first. NaN spreads in this order, so the cause is near the front.
    """
    wrong_loss = loss is not None and not bool(torch.isfinite(loss).all())
    weights = _on_any_rank(_found(model, experts, lambda tensor: tensor), names)
    gradients = _on_any_rank(_found(model, experts, lambda tensor: tensor.grad), names)
    return [
        *map(_text, weights),
        *(f"loss of rank {rank}" for rank, wrong in enumerate(gather(wrong_loss)) if wrong),
        *(f"gradient of {_text(place)}" for place in reversed(gradients)),
    ]


def _on_any_rank(found: set[Place], names: Sequence[str]) -> list[Place]:
    """What any rank has found, in the model's order. Collective."""
    order = {name: position for position, name in enumerate(names)}
    places = set().union(*gather(found))
    return sorted(places, key=lambda place: (order.get(place[0], len(order)), place))


def _text(place: Place) -> str:
    name, expert = place
    return name if expert == WHOLE else f"{name}, expert {expert}"


def _found(model: nn.Module, experts: Sequence[OwnedExperts], part: Callable[[Tensor], Tensor | None]) -> set[Place]:
    """Places where this rank's `part` of a tensor (e.g. its gradient) is not finite; waits for the device once."""
    places: list[Place] = []
    flags: list[Tensor] = []
    for where, tensor in _tensors(model, experts, part):
        places += where
        flags.append(_finite_rows(tensor.reshape(len(where), -1)))
    finite = torch.cat(flags).tolist() if flags else []
    return {place for place, good in zip(places, finite, strict=True) if not good}


def _tensors(
    model: nn.Module, experts: Sequence[OwnedExperts], part: Callable[[Tensor], Tensor | None]
) -> Iterator[tuple[list[Place], Tensor]]:
    """Pairs of places and a floating-point tensor that can be viewed as one row per place."""
    pools = {id(entry.parameter) for entry in experts}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = None if id(tensor) in pools else part(tensor)
        if value is not None and value.is_floating_point() and local_tensor(value).numel():
            yield [(original_name(name), WHOLE)], local_tensor(value)
    for entry in experts:
        value = part(entry.parameter)
        owned = [(entry.name, expert) for expert in entry.experts.tolist()]
        if value is not None and owned:
            yield owned, entry.of(local_tensor(value))


def _finite_rows(rows: Tensor) -> Tensor:
    """Bool `[n]`: whether each of the rows `[n, m]` is finite.

    Tests the largest magnitude of each row, which needs no mask `[n, m]`.
    """
    return torch.isfinite(torch.linalg.vector_norm(rows, float("inf"), dim=1))
