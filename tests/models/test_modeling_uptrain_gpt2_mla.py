from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models import latent_checks as check
from tests.models.gpt2_models import HEAD_DIM, HEADS, LAYERS, SIZES, greedy, prompt
from uptrain.models.register import register
from uptrain.models.remote_code.modeling_uptrain_gpt2_mla import (
    UptrainGPT2MLAConfig,
    UptrainGPT2MLALMHeadModel,
    UptrainGPT2MLAModel,
)

WIDTH = HEADS * HEAD_DIM
both_kernels = pytest.mark.parametrize("attention", ["sdpa", "eager"])
both_caches = pytest.mark.parametrize("cache", ["dynamic", "static"])


def source(attention: str = "sdpa", **options: Any) -> GPT2LMHeadModel:
    """Make transformers' own GPT-2, seeded and in eval mode."""
    return check.randomise(GPT2LMHeadModel(GPT2Config(attn_implementation=attention, **SIZES | options)))


def full_rank(model: GPT2LMHeadModel) -> UptrainGPT2MLALMHeadModel:
    """Return the model whose latent is GPT-2's keys and values side by side, the up-projection picking each."""
    settings = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    config = UptrainGPT2MLAConfig(**settings, attn_implementation=model.config._attn_implementation)
    assert config.kv_lora_rank == 2 * WIDTH, "no loss must be the default"
    heads = torch.arange(WIDTH).view(HEADS, HEAD_DIM)
    picked = torch.cat([heads, heads + WIDTH], dim=1).flatten()
    tensors = {}
    for name, tensor in model.state_dict().items():
        base, is_attention, kind = name.partition("c_attn.")
        if not is_attention:
            tensors[name] = tensor
            continue
        rows = tensor.movedim(-1, 0)
        tensors[f"{base}q_proj.{kind}"] = rows[:WIDTH]
        tensors[f"{base}kv_a_proj_with_mqa.{kind}"] = rows[WIDTH:]
        tensors[f"{base}kv_b_proj.weight"] = torch.eye(2 * WIDTH)[picked]
    mine = UptrainGPT2MLALMHeadModel(config)
    mine.load_state_dict(tensors)
    return mine.eval()


def low_rank(attention: str = "sdpa", **options: Any) -> UptrainGPT2MLALMHeadModel:
    sizes = {"kv_lora_rank": 7, "qk_nope_head_dim": 6, "v_head_dim": 5} | options
    config = UptrainGPT2MLAConfig(attn_implementation=attention, **SIZES | sizes)
    return check.randomise(UptrainGPT2MLALMHeadModel(config))


@both_kernels
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_full_rank_latent_is_gpt2(options: dict[str, Any], attention: str) -> None:
    oracle = source(attention, **options)
    model = full_rank(oracle)
    check.logits_are_the_sources(model, oracle)
    with check.always(model, None) as choices:
        assert torch.equal(greedy(model, prompt()), greedy(oracle, prompt()))
    assert sum(choices) == 11 * LAYERS, "every step after the prefill absorbs"


@both_kernels
def test_generation_is_the_same_with_every_cache_and_none(attention: str) -> None:
    oracle = source(attention)
    check.generates_what_the_source_does(full_rank(oracle), oracle)
    narrow = low_rank(attention)
    check.generates_what_the_source_does(narrow, narrow)


@both_kernels
@both_caches
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(cache: str, attention: str) -> None:
    check.a_padded_batch_generates_what_each_row_does_alone(full_rank(source(attention)), cache)


def test_beam_search_finds_what_gpt2_finds() -> None:
    oracle = source()
    check.beam_search_finds_what_the_source_finds(full_rank(oracle), oracle)


@both_kernels
@both_caches
def test_a_prompt_in_chunks_is_the_prompt(cache: str, attention: str) -> None:
    check.chunks_give_what_the_whole_gives(low_rank(attention), cache)


@both_kernels
def test_absorbed_and_expanded_attention_agree_at_any_size(attention: str) -> None:
    @settings(max_examples=15, deadline=None)
    @given(
        *(st.integers(1, 12) for _ in range(3)), st.integers(1, 3), st.lists(st.integers(1, 4), min_size=2, max_size=4)
    )
    def agree(rank: int, key: int, value: int, batch: int, chunks: list[int]) -> None:
        model = low_rank(attention, kv_lora_rank=rank, qk_nope_head_dim=key, v_head_dim=value).double()
        check.absorbed_is_expanded(model, prompt(batch, sum(chunks)), chunks, atol=1e-10)

    agree()


def test_many_queries_and_few_slots_are_expanded() -> None:
    attention = low_rank(kv_lora_rank=64, qk_nope_head_dim=8, v_head_dim=8).transformer.h[0].attn
    latent, mask = torch.zeros(1, 1, 1000, 64), torch.ones(1)
    assert attention.absorbs(1, latent, None)
    assert attention.absorbs(8, latent, mask)
    assert not attention.absorbs(8, latent, None), "no mask: a prefill into an empty static cache"
    assert not attention.absorbs(10, latent, mask), "expanding takes fewer products"
    cheap = low_rank(kv_lora_rank=2).transformer.h[0].attn
    assert cheap.absorbs(999, latent[..., :2], mask)
    assert not cheap.absorbs(1000, latent[..., :2], mask), "nothing was cached"
    attention.config._attn_implementation = "flash_attention_2"
    assert not attention.absorbs(1, latent, None)


def test_a_wrapped_up_projection_is_called_not_read() -> None:
    check.a_wrapped_up_projection_is_called_not_read(low_rank())


def test_other_kernels_get_the_expanded_heads_and_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        calls.append((tuple(query.shape), tuple(key.shape), tuple(value.shape), options["scaling"]))
        return torch.zeros(*query.transpose(1, 2).shape[:3], value.shape[-1]), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", kernel)
    model = low_rank()
    model.config._attn_implementation = "mine"
    greedy(model, prompt(), max_new_tokens=2)
    keys = [(2, HEADS, tokens, 6) for tokens in (11, 12)]
    values = [(2, HEADS, tokens, 5) for tokens in (11, 12)]
    assert [call[1:3] for call in calls[::LAYERS]] == list(zip(keys, values, strict=True))
    assert {call[3] for call in calls} == {HEAD_DIM**-0.5}


@both_kernels
def test_gradient_checkpointing_changes_no_gradient(attention: str) -> None:
    check.checkpointing_changes_no_gradient(low_rank(attention, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def test_dropout_draws_as_gpt2_does() -> None:
    oracle = source("eager", attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1)
    check.dropout_draws_as_the_source_does(full_rank(oracle), oracle)


def test_the_cache_holds_exactly_the_latent() -> None:
    check.the_cache_holds_only(low_rank(), values=7)


def test_output_attentions_has_one_map_per_query_head() -> None:
    check.attention_maps_have_one_per_head(low_rank("eager"), HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_folder_carries_its_own_code(tied: bool, tmp_path: Path) -> None:
    model = low_rank(tie_word_embeddings=tied)
    check.loads_in_a_process_without_uptrain(model, tmp_path)
    loaded = UptrainGPT2MLALMHeadModel.from_pretrained(tmp_path / "saved")
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is tied


def test_registered_classes_serve_a_folder_without_remote_code(tmp_path: Path) -> None:
    register()
    low_rank().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is UptrainGPT2MLAConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is UptrainGPT2MLAModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is UptrainGPT2MLALMHeadModel


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_lora_rank"):
        UptrainGPT2MLAConfig(kv_lora_rank=0)
    with pytest.raises(ValueError, match="qk_nope_head_dim"):
        UptrainGPT2MLAConfig(qk_nope_head_dim=0)
    with pytest.raises(ValueError, match="no rotary keys"):
        UptrainGPT2MLAConfig(qk_rope_head_dim=8)
    with pytest.raises(ValueError, match="cross-attention"):
        UptrainGPT2MLAConfig(add_cross_attention=True)
