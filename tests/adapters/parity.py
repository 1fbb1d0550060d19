"""FSSDP against the same transformers model in one process: logits, losses, gradients, norms, parameters."""

from __future__ import annotations

import copy
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hecate
from tests.adapters.tiny import tiny_model
from tests.runtime.reference import full_gradients

STEPS = 5
LENGTH = 8
TOLERANCE = 1e-5


def compare_with_plain(model_type: str, config: hecate.FSSDPConfig) -> None:
    """Runs on every rank; rank 0 holds the plain model and asserts."""
    plain = spread_router(tiny_model(model_type))
    engine = hecate.fully_shard(copy.deepcopy(plain), None, config)
    optimizer, plain_optimizer = adamw(engine.model), adamw(plain)
    for step in range(STEPS):
        loss, logits = train(engine.model, [batch(step, dist.get_rank())])
        gradients = full_gradients(engine)
        norm = engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        state = engine.full_state_dict()
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            everybody = [batch(step, rank) for rank in range(dist.get_world_size())]
            plain_loss, plain_logits = train(plain, everybody)
            close(f"step {step}: logits", logits, plain_logits)
            close(f"step {step}: loss", loss / dist.get_world_size(), plain_loss)
            for name, p in plain.named_parameters():
                close(
                    f"step {step}: gradient of {name}",
                    gradients[name],
                    torch.zeros_like(p) if p.grad is None else p.grad,
                )
            close(f"step {step}: norm", norm, torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
            plain_optimizer.step()
            plain_optimizer.zero_grad()
            assert list(state) == list(plain.state_dict())
            for name, value in plain.state_dict().items():
                close(f"step {step}: {name}", state[name], value)


def spread_router(model: nn.Module) -> nn.Module:
    """Make routers decide clearly and unevenly: a rounding difference must not move a token to another expert."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and name.endswith(("router.weight", "gate.weight")):
                p.mul_(20)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """With an epsilon above rounding noise: some gradients, such as a key bias's, are zero but for that."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-4)


def batch(step: int, rank: int) -> Tensor:
    """Tokens of one rank, the same wherever they are made."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(3, 64, (2, LENGTH), generator=generator)


def train(model: nn.Module, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Forward and backward of the mean loss; (that loss, logits of the first batch)."""
    total, logits = torch.zeros(()), []
    for tokens in batches:
        torch.manual_seed(int(tokens.sum()))  # dropout and sampling routers draw the same for the same tokens
        output = model(input_ids=tokens, labels=tokens)
        (output.loss / len(batches)).backward()
        total += output.loss.detach() / len(batches)
        logits.append(output.logits.detach())
    return total, logits[0]


def close(what: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Relative to the largest value, with room for rounding where all values are tiny."""
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).norm()
    allowed = tolerance * max(float(expected.norm()), 1e-2 * math.sqrt(max(1, expected.numel())))
    assert error <= allowed, f"{what}: error {error:.3g} of norm {expected.norm():.3g}"
