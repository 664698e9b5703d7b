from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.models import latent_checks as check
from tests.models.gpt2_models import HEAD_DIM, HEADS, LAYERS, VOCAB, greedy, prompt
from uptrain.models.register import register
from uptrain.models.remote_code.modeling_uptrain_llama_mla import (
    UptrainLlamaMLAConfig,
    UptrainLlamaMLAForCausalLM,
    UptrainLlamaMLAModel,
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
# Short enough wavelengths for the scaling to change some frequencies, blend one and leave others.
LLAMA3 = PLAIN | {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
YARN = PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
# Both sides of its length are reached within one generation.
LONGROPE = PLAIN | {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
    "factor": 3.0,
}
SLOW = {"kv_lora_rank": 7, "v_head_dim": 5}
NARROW: dict[str, dict[str, Any]] = {
    "decoupled": SLOW | {"qk_nope_head_dim": 3, "qk_rope_head_dim": 4},
    "re-rotate": SLOW | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 0, "num_key_value_heads": 2},
}

both_kernels = pytest.mark.parametrize("attention", ["sdpa", "eager"])
both_caches = pytest.mark.parametrize("cache", ["dynamic", "static"])
both_modes = pytest.mark.parametrize("mode", ["decoupled", "re-rotate"])
each_grouping = pytest.mark.parametrize("groups", [1, 2, HEADS], ids=["mqa", "gqa", "mha"])
each_scaling = pytest.mark.parametrize("rope", [PLAIN, LLAMA3, YARN], ids=lambda rope: rope["rope_type"])


def source(groups: int, attention: str = "sdpa", rope: dict[str, Any] = PLAIN, **options: Any) -> LlamaForCausalLM:
    """Make transformers' own Llama with biased attention, seeded and in eval mode."""
    options = {"num_key_value_heads": groups, "attention_bias": True, "rope_parameters": dict(rope)} | options
    return check.randomise(LlamaForCausalLM(LlamaConfig(attn_implementation=attention, **SIZES | options)))


def moved(model: LlamaForCausalLM, attentions: list[dict[str, torch.Tensor]], **changes: Any) -> Any:
    """Return our Llama with every tensor of `model` but q, k and v, and those that each layer is given."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "head_dim")}
    bias = model.config.attention_bias
    settings |= {"qkv_bias": bias, "attention_scale": HEAD_DIM**-0.5, "v_head_dim": HEAD_DIM} | changes
    mine = UptrainLlamaMLAForCausalLM(
        UptrainLlamaMLAConfig(attn_implementation=model.config._attn_implementation, **settings)
    )
    replaced = (".q_proj.", ".k_proj.", ".v_proj.")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not any(r in name for r in replaced)}
    for index, attention in enumerate(attentions):
        tensors |= {f"model.layers.{index}.self_attn.{name}": tensor for name, tensor in attention.items()}
    if not bias:
        tensors = {name: tensor for name, tensor in tensors.items() if "attn" not in name or "bias" not in name}
    mine.load_state_dict(tensors)
    return mine.eval()


def rows_of(attention: Any, name: str) -> torch.Tensor:
    """Return a projection's rows with their bias, (heads, HEAD_DIM, hidden_size + 1)."""
    linear = getattr(attention, name)
    bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return torch.cat([linear.weight, bias[:, None]], dim=1).unflatten(0, (-1, HEAD_DIM)).detach()


def linear_of(name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = rows.reshape(-1, rows.shape[-1])
    return {f"{name}.weight": rows[:, :-1], f"{name}.bias": rows[:, -1]}


def re_rotated(model: LlamaForCausalLM) -> UptrainLlamaMLAForCausalLM:
    """Return the model whose latent is the source's unrotated keys and values side by side."""
    groups = model.config.num_key_value_heads
    width = groups * HEAD_DIM
    heads = torch.arange(width).view(groups, HEAD_DIM)
    picked = torch.cat([heads, heads + width], dim=1).flatten()
    attentions = []
    for layer in model.model.layers:
        q, k, v = (rows_of(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj"))
        down = linear_of("kv_a_proj_with_mqa", torch.cat([k, v]))
        attentions.append(linear_of("q_proj", q) | down | {"kv_b_proj.weight": torch.eye(2 * width)[picked]})
    sizes = {"kv_lora_rank": 2 * width, "qk_nope_head_dim": HEAD_DIM, "qk_rope_head_dim": 0}
    return moved(model, attentions, rope_mode="re-rotate", **sizes)


def decoupled(model: LlamaForCausalLM, nope: int = 0) -> UptrainLlamaMLAForCausalLM:
    """Return the model with all the source's key heads side by side in the rotary key and its values in the latent.

    Pairs go from half-split to interleaved. A query head's rows meet its own key head only. `nope` unrotated
    dimensions see zero keys. Several heads' frequencies side by side are a table that longrope can hold.
    """
    groups = model.config.num_key_value_heads
    width = groups * HEAD_DIM
    interleave = torch.arange(HEAD_DIM).view(2, -1).T.flatten()
    group_of = torch.arange(HEADS) // (HEADS // groups)
    attentions = []
    for layer in model.model.layers:
        q, k, v = (rows_of(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj"))
        q_rope = torch.zeros(HEADS, groups, *q.shape[1:])
        q_rope[torch.arange(HEADS), group_of] = q[:, interleave]
        q_nope = torch.randn(HEADS, nope, q.shape[-1])
        down = torch.cat([v.flatten(0, 1), k[:, interleave].flatten(0, 1)])
        up = torch.zeros(HEADS, nope + HEAD_DIM, groups, HEAD_DIM)
        up[torch.arange(HEADS), nope:, group_of] = torch.eye(HEAD_DIM)
        attention = linear_of("q_proj", torch.cat([q_nope, q_rope.flatten(1, 2)], dim=1))
        attention |= linear_of("kv_a_proj_with_mqa", down) | {"kv_b_proj.weight": up.reshape(-1, width)}
        attentions.append(attention)
    sizes = {"kv_lora_rank": width, "qk_nope_head_dim": nope, "qk_rope_head_dim": width, "num_key_value_heads": HEADS}
    if groups > 1:
        wanted = model.model.rotary_emb.inv_freq.double().repeat(groups)
        base = 100.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        factors = (base / wanted).tolist()
        longrope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
        scaling = {"attention_factor": model.model.rotary_emb.attention_scaling}
        table = PLAIN | longrope | scaling | {"original_max_position_embeddings": 48}
        return moved(model, attentions, rope_parameters=table, **sizes)
    return moved(model, attentions, **sizes)


FULL_RANK = {"decoupled": decoupled, "re-rotate": re_rotated}


def narrow(mode: str, attention: str = "sdpa", **options: Any) -> UptrainLlamaMLAForCausalLM:
    options = SIZES | NARROW[mode] | {"qkv_bias": True, "attention_bias": True, "rope_parameters": PLAIN} | options
    config = UptrainLlamaMLAConfig(rope_mode=mode, attn_implementation=attention, **options)
    return check.randomise(UptrainLlamaMLAForCausalLM(config))


@both_kernels
@each_scaling
@each_grouping
@both_modes
def test_a_full_rank_latent_is_llama(mode: str, groups: int, rope: dict[str, Any], attention: str) -> None:
    oracle = source(groups, attention, rope)
    model = FULL_RANK[mode](oracle)
    check.logits_are_the_sources(model, oracle)
    with check.always(model, None) as choices:
        assert torch.equal(greedy(model, prompt()), greedy(oracle, prompt()))
    assert sum(choices) == (0 if mode == "re-rotate" else 11 * LAYERS)


@pytest.mark.parametrize("options", [{"attention_bias": False}, {"tie_word_embeddings": True, "mlp_bias": True}])
@both_modes
def test_llamas_options_keep_their_meaning(mode: str, options: dict[str, Any]) -> None:
    oracle = source(1, **options)
    check.logits_are_the_sources(FULL_RANK[mode](oracle), oracle)


def test_unrotated_dimensions_stand_before_the_rotary_ones() -> None:
    oracle = source(1)
    check.logits_are_the_sources(decoupled(oracle, nope=4), oracle)


@both_kernels
@both_modes
def test_generation_is_the_same_with_every_cache_and_none(mode: str, attention: str) -> None:
    oracle = source(1 if mode == "decoupled" else 2, attention, LLAMA3)
    check.generates_what_the_source_does(FULL_RANK[mode](oracle), oracle)
    model = narrow(mode, attention)
    check.generates_what_the_source_does(model, model)


@both_kernels
@both_caches
@pytest.mark.parametrize("groups", [1, 2])
@both_modes
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(
    mode: str, groups: int, cache: str, attention: str
) -> None:
    check.a_padded_batch_generates_what_each_row_does_alone(FULL_RANK[mode](source(groups, attention, YARN)), cache)


@both_modes
def test_beam_search_finds_what_llama_finds(mode: str) -> None:
    oracle = source(2)
    check.beam_search_finds_what_the_source_finds(FULL_RANK[mode](oracle), oracle)


@both_kernels
@both_caches
@both_modes
def test_a_prompt_in_chunks_is_the_prompt(mode: str, cache: str, attention: str) -> None:
    check.chunks_give_what_the_whole_gives(narrow(mode, attention), cache)


@both_caches
def test_re_rotation_follows_a_table_that_changes_with_length(cache: str) -> None:
    """Rotated at every reading, keys never keep a shorter text's angles. Latents of later layers do: one layer here."""
    model = narrow("re-rotate", rope_parameters=LONGROPE, num_hidden_layers=1)
    uncached = greedy(model, prompt(), use_cache=False)
    assert torch.equal(greedy(model, prompt(), cache_implementation=cache), uncached)


@both_kernels
def test_absorbed_and_expanded_attention_agree_at_any_size(attention: str) -> None:
    @settings(max_examples=15, deadline=None)
    @given(
        *(st.integers(1, 12) for _ in range(4)), st.integers(1, 3), st.lists(st.integers(1, 4), min_size=2, max_size=4)
    )
    def agree(rank: int, nope: int, pairs: int, value: int, batch: int, chunks: list[int]) -> None:
        sizes = {"kv_lora_rank": rank, "qk_nope_head_dim": nope - 1, "qk_rope_head_dim": 2 * pairs, "v_head_dim": value}
        model = narrow("decoupled", attention, **sizes).double()
        check.absorbed_is_expanded(model, prompt(batch, sum(chunks)), chunks, atol=1e-6)

    agree()


def test_many_queries_and_few_slots_are_expanded() -> None:
    sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    attention = narrow("decoupled", **sizes).model.layers[0].self_attn
    latent, mask = torch.zeros(1, 1, 1000, 64), torch.ones(1)
    assert attention.absorbs(1, latent, None)
    assert attention.absorbs(7, latent, mask)
    assert not attention.absorbs(7, latent, None), "no mask: a prefill into an empty static cache"
    assert not attention.absorbs(9, latent, mask), "expanding takes fewer products"
    cheap = narrow("decoupled", kv_lora_rank=1, qk_nope_head_dim=8, qk_rope_head_dim=2).model.layers[0].self_attn
    assert cheap.absorbs(999, latent[..., :1], mask)
    assert not cheap.absorbs(1000, latent[..., :1], mask), "nothing was cached"
    attention.config._attn_implementation = "flash_attention_2"
    assert not attention.absorbs(1, latent, None)


@both_modes
def test_a_wrapped_up_projection_is_called_not_read(mode: str) -> None:
    check.a_wrapped_up_projection_is_called_not_read(narrow(mode))


@both_kernels
@both_modes
def test_gradient_checkpointing_changes_no_gradient(mode: str, attention: str) -> None:
    check.checkpointing_changes_no_gradient(narrow(mode, attention))


@both_modes
def test_dropout_draws_as_llama_does(mode: str) -> None:
    oracle = source(2, "eager", attention_dropout=0.4)
    check.dropout_draws_as_the_source_does(FULL_RANK[mode](oracle), oracle)


@pytest.mark.parametrize(("mode", "values"), [("decoupled", 7 + 4), ("re-rotate", 7)])
def test_the_cache_holds_exactly_the_latent_and_the_rotary_key(mode: str, values: int) -> None:
    check.the_cache_holds_only(narrow(mode), values)


@both_modes
def test_output_attentions_has_one_map_per_query_head(mode: str) -> None:
    check.attention_maps_have_one_per_head(narrow(mode, "eager"), HEADS)


@pytest.mark.slow
@both_modes
def test_a_saved_folder_carries_its_own_code(mode: str, tmp_path: Path) -> None:
    check.loads_in_a_process_without_uptrain(narrow(mode), tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_registered_classes_serve_a_folder_without_remote_code(tied: bool, tmp_path: Path) -> None:
    register()
    model = narrow("decoupled", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is UptrainLlamaMLAConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is UptrainLlamaMLAModel
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is UptrainLlamaMLAForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(loaded(prompt()).logits, model(prompt()).logits)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="rope_mode"):
        UptrainLlamaMLAConfig(rope_mode="none")
    with pytest.raises(ValueError, match="kv_lora_rank"):
        UptrainLlamaMLAConfig(kv_lora_rank=0)
    with pytest.raises(ValueError, match="3 dimensions"):
        UptrainLlamaMLAConfig(qk_rope_head_dim=3)
    with pytest.raises(ValueError, match="0 dimensions"):
        UptrainLlamaMLAConfig(qk_rope_head_dim=0)
    with pytest.raises(ValueError, match="rotary key"):
        UptrainLlamaMLAConfig(rope_mode="re-rotate")
    with pytest.raises(ValueError, match="num_key_value_heads"):
        UptrainLlamaMLAConfig(num_key_value_heads=8)
    assert UptrainLlamaMLAConfig().attention_scale == (128 + 64) ** -0.5
