"""The latent's norm: neutral in the file, absent in training, back to the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from uptrain.architectures.mla_projections import NEUTRAL_SCALE, NEUTRAL_WEIGHT
from uptrain.errors import UsageError
from uptrain.models.neutral_norm import AbsentNorm, fold, is_neutral, unfold


def config(**changes) -> DeepseekV3Config:
    return DeepseekV3Config(**{
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": None,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2,
        "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "rms_norm_eps": 1e-6, **changes,
    })  # fmt: skip


def neutral(dtype: torch.dtype = torch.float32, **changes) -> DeepseekV3ForCausalLM:
    """Build a random model whose latent norms are neutral, without using what is tested here."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config(**changes)).eval()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.kv_a_proj_with_mqa.weight.data[:12] *= NEUTRAL_SCALE
        attention.kv_a_layernorm.weight.data.fill_(NEUTRAL_WEIGHT)
        if attention.q_a_proj is not None:
            attention.q_a_proj.weight.data *= NEUTRAL_SCALE
            attention.q_a_layernorm.weight.data.fill_(NEUTRAL_WEIGHT)
    return model.to(dtype)


def ids(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 48}], ids=["whole", "two-factor"])
def test_a_neutral_norm_is_no_norm(changes):
    stock = neutral(**changes)
    bare = neutral(**changes)
    for layer in bare.model.layers:
        attention = layer.self_attn
        attention.kv_a_proj_with_mqa.weight.data[:12] /= NEUTRAL_SCALE
        attention.kv_a_layernorm = torch.nn.Identity()
        if attention.q_a_proj is not None:
            attention.q_a_proj.weight.data /= NEUTRAL_SCALE
            attention.q_a_layernorm = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids()).logits, bare(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 48}], ids=["whole", "two-factor"])
def test_folding_what_was_unfolded_leaves_logits_alone(dtype, changes):
    model = neutral(dtype, **changes)
    before, state = model(ids()).logits.detach(), copy.deepcopy(model.state_dict())
    trained = model.float()
    with torch.no_grad():
        wanted = trained(ids()).logits
        assert unfold(trained) == 2 * (1 + len(changes))
        torch.testing.assert_close(trained(ids()).logits, wanted, rtol=1e-5, atol=1e-5)
    fold(trained, dtype)
    after = trained.to(dtype)
    assert after.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in after.state_dict().items())
    assert torch.equal(after(ids()).logits.detach(), before)


def test_no_weight_is_tiny_or_huge_while_training():
    model = neutral()
    unfold(model)
    assert not any("a_layernorm" in name for name, _ in model.named_parameters())
    sizes = [float(value.detach().abs().max()) for value in model.parameters()]
    assert 1e-3 < min(sizes) < max(sizes) < 10
    assert isinstance(model.model.layers[0].self_attn.kv_a_layernorm, AbsentNorm)


def test_a_live_norm_stays():
    model = neutral()
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.weight.data[0] = 2.0
    assert not is_neutral(model.model.layers[0].self_attn.kv_a_layernorm)
    assert unfold(model) == 0
    fold(model, torch.float16)
    assert isinstance(model.model.layers[0].self_attn.kv_a_layernorm, DeepseekV3RMSNorm)


def test_float16_is_refused_with_the_reason():
    model = neutral()
    unfold(model)
    with pytest.raises(UsageError, match="float16 can't hold"):
        fold(model, torch.float16)
