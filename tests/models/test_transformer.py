"""GPT-MoE and BERT-MoE: losses, masks, initial values, activation checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.models import BertMoE, GPTMoE, ModelConfig, TransformerMoE, mask_tokens
from hecate.models.transformer import rotate

CONFIG = ModelConfig(vocab_size=11, d_model=8, num_layers=2, num_heads=2, num_experts=4, max_length=6)
MODELS = pytest.mark.parametrize("kind", [GPTMoE, BertMoE])


def batch(size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 10, (size, 7), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: TransformerMoE) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@MODELS
def test_loss_is_cross_entropy_plus_weighted_aux(kind: type[TransformerMoE]) -> None:
    model, (tokens, targets) = kind(CONFIG).double(), batch()
    targets = targets.clone()
    targets[0, :4] = -100
    out = model(tokens, targets)
    kept = targets.flatten() != -100
    expected = F.cross_entropy(out.logits.flatten(0, 1)[kept], targets.flatten()[kept])
    torch.testing.assert_close(out.lm_loss, expected)
    torch.testing.assert_close(out.loss, expected + CONFIG.aux_weight * out.aux_loss)
    assert model(tokens).loss is None


def test_gpt_sees_the_past_only_and_bert_both_sides() -> None:
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 10
    gpt, bert = GPTMoE(CONFIG).double(), BertMoE(CONFIG).double()
    torch.testing.assert_close(gpt(tokens).logits[:, :3], gpt(changed).logits[:, :3])
    assert not torch.allclose(gpt(tokens).logits[:, 3:], gpt(changed).logits[:, 3:])
    assert not torch.allclose(bert(tokens).logits[:, :3], bert(changed).logits[:, :3])


def test_positions_are_relative() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    queries, keys = (rotate(x.expand(1, 1, 9, 4)) for x in (q, k))
    scores = (queries @ keys.transpose(-1, -2))[0, 0]
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores[0, 0], q @ k)
    assert not torch.allclose(scores[0, 1], scores[1, 0])


@MODELS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing_also_under_accumulation(kind: type[TransformerMoE], use_reentrant: bool) -> None:
    plain = kind(CONFIG).double()
    settings = {**vars(CONFIG), "checkpoint": True, "use_reentrant": use_reentrant}
    recomputed = kind(ModelConfig(**settings)).double()
    recomputed.load_state_dict(plain.state_dict())
    for seed in (0, 1):
        for model in (plain, recomputed):
            model(*batch(seed=seed)).loss.backward()
    assert gradients(plain).keys() == dict(plain.named_parameters()).keys()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(recomputed)[name]), name


@MODELS
def test_initial_values_depend_on_seed_and_name_alone(kind: type[TransformerMoE]) -> None:
    torch.manual_seed(5)
    model = kind(CONFIG)
    model.init_weights(seed=3)
    with torch.device("meta"):
        late = kind(CONFIG)
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    late.init_weights(seed=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, late.get_parameter(name)), name
    late.init_weights(seed=4)
    assert not torch.equal(model.head.weight, late.head.weight)
    assert not torch.equal(model.blocks[0].moe.experts.up, model.blocks[1].moe.experts.up)


@MODELS
def test_rank_without_tokens_contributes_zero(kind: type[TransformerMoE]) -> None:
    model, (tokens, targets) = kind(CONFIG), batch()
    out = model(tokens[:0], targets[:0])
    assert out.loss == 0
    out.loss.backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().sum() == 0 for gradient in gradients(model).values())


def test_bfloat16_model_returns_float32_losses() -> None:
    out = GPTMoE(CONFIG).bfloat16()(*batch())
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == out.lm_loss.dtype == out.aux_loss.dtype == torch.float32


def test_gpt_learns_a_sequence() -> None:
    model, (tokens, targets) = GPTMoE(CONFIG), batch()
    before = copy.deepcopy(model)(tokens, targets).lm_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens, targets).loss.backward()
        optimizer.step()
    assert model(tokens, targets).lm_loss < before / 4


def test_mask_tokens_hides_what_it_asks_for() -> None:
    tokens = torch.randint(0, 10, (200, 100), generator=torch.Generator().manual_seed(0))
    inputs, targets = mask_tokens(tokens, 11, torch.Generator().manual_seed(1))
    chosen = targets != -100
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert abs(chosen.double().mean() - 0.15) < 0.01
    assert abs((inputs[chosen] == 10).double().mean() - 0.8) < 0.03
    assert abs((inputs[chosen] == tokens[chosen]).double().mean() - 0.11) < 0.02  # 10 % kept, 1 % drawn again


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="d_model=9 must be an even multiple of num_heads=2"):
        ModelConfig(d_model=9, num_heads=2)
    with pytest.raises(ValueError, match="num_layers=0: must be >= 1"):
        ModelConfig(num_layers=0)
    with pytest.raises(ValueError, match="sequences of 7 tokens, must be <= max_length=6"):
        GPTMoE(CONFIG)(torch.zeros(1, 7, dtype=torch.int64))
