"""The gate and the dense MoE layer against a slow per-token loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.models import Experts, MoE, TopKGate

T, D, FF, E = 17, 6, 12, 5


def make_experts(dtype: torch.dtype = torch.float64) -> Experts:
    experts = Experts(E, D, FF).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    return experts


def make_gate(top_k: int, **options: float) -> TopKGate:
    gate = TopKGate(D, E, top_k, **options).double()
    with torch.no_grad():
        gate.weight.normal_(generator=torch.Generator().manual_seed(1))
    return gate


def rows(seed: int = 2, tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_experts(experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One token and one expert at a time."""
    out = []
    for token, ids, shares in zip(hidden, index.tolist(), weights, strict=True):
        parts = [experts.down[e] @ F.gelu(experts.up[e] @ token) * w for e, w in zip(ids, shares, strict=True)]
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_experts_match_token_loop_forward_and_backward(top_k: int) -> None:
    experts, hidden = make_experts(), rows().requires_grad_()
    index = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(T)])
    weights = torch.rand(T, top_k, dtype=torch.float64).requires_grad_()
    leaves = [hidden, weights, *experts.parameters()]
    result, expected = experts(hidden, index, weights), slow_experts(experts, hidden, index, weights)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(result)
    for got, want in zip(
        torch.autograd.grad(result, leaves, probe), torch.autograd.grad(expected, leaves, probe), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_expert_without_tokens_gets_a_zero_gradient() -> None:
    experts = make_experts()
    index = torch.tensor([[0, 1], [1, 0]])
    experts(rows(tokens=2), index, torch.ones(2, 2, dtype=torch.float64)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[2:].abs().sum() == 0
        assert parameter.grad[:2].abs().sum() > 0


def test_no_tokens_is_a_normal_batch() -> None:
    moe = MoE(make_gate(2), make_experts())
    output, aux_loss = moe(rows(tokens=0).requires_grad_())
    assert output.shape == (0, D)
    assert aux_loss == 0
    (output.sum() + aux_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in moe.parameters())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gate_takes_the_best_experts_and_normalizes_their_weights(top_k: int) -> None:
    gate, hidden = make_gate(top_k), rows()
    routing = gate(hidden)
    probabilities = (hidden @ gate.weight.T).softmax(1)
    best = probabilities.sort(dim=1, descending=True)
    assert torch.equal(routing.expert_index, best.indices[:, :top_k])
    kept = best.values[:, :top_k]
    torch.testing.assert_close(routing.weights, kept / kept.sum(1, keepdim=True) if top_k > 1 else kept)


def test_aux_loss_is_gshards() -> None:
    gate, hidden = make_gate(2), rows()
    probabilities = (hidden @ gate.weight.T).softmax(1)
    first = probabilities.argmax(1)
    expected = sum((first == e).double().mean() * probabilities[:, e].mean() for e in range(E)) * E
    torch.testing.assert_close(gate(hidden).aux_loss, expected)
    gate.weight.data.zero_()
    torch.testing.assert_close(gate(hidden).aux_loss, torch.ones((), dtype=torch.float64))


def test_bfloat16_gate_decides_in_float32() -> None:
    gate, hidden = make_gate(2).bfloat16(), rows().bfloat16()
    routing = gate(hidden)
    expected = (hidden.float() @ gate.weight.float().T).softmax(1).topk(2).indices
    assert routing.weights.dtype == routing.aux_loss.dtype == torch.float32
    assert torch.equal(routing.expert_index, expected)


def test_random_second_expert_keeps_the_first_and_follows_the_probabilities() -> None:
    torch.manual_seed(0)
    gate = make_gate(2, random_second_expert=True)
    hidden = rows(tokens=1).expand(20000, D)
    probability = (hidden[0] @ gate.weight.T).softmax(0)
    index = gate(hidden).expert_index
    assert (index[:, 0] == probability.argmax()).all()
    assert (index[:, 0] != index[:, 1]).all()
    probability[probability.argmax()] = 0
    share = torch.bincount(index[:, 1], minlength=E) / len(index)
    torch.testing.assert_close(share.double(), probability / probability.sum(), rtol=0, atol=0.02)
    gate.eval()
    assert torch.equal(gate(hidden).expert_index, (hidden @ gate.weight.T).topk(2).indices)


def test_jitter_changes_training_only() -> None:
    torch.manual_seed(0)
    gate, plain, hidden = make_gate(2, jitter=0.5), make_gate(2), rows()
    assert not torch.equal(gate(hidden).weights, plain(hidden).weights)
    assert torch.equal(gate.eval()(hidden).weights, plain(hidden).weights)


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_k_outside_the_experts_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k={top_k} must be in \[1, num_experts=5\]"):
        TopKGate(D, E, top_k)
