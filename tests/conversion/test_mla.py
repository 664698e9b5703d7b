"""Conversions to latents, end to end: exact where they can be, in the classes that people load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import uptrain
from tests.conftest import tiny_config, tiny_model
from uptrain.checkpoint.manifest import verify
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UsageError
from uptrain.evaluation.reading import cache_of

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}


def source(folder: Path, model_type: str, **changes: Any) -> Any:
    if model_type == "llama":
        changes = {"attention_bias": False, **changes}
    model = tiny_model(tiny_config(model_type, **changes)).float().eval()
    # Norms and biases as a trained model has them, not ones and zeros.
    generator = torch.Generator().manual_seed(7)
    for name, value in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(2, 60, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same_logits(one: Any, two: Any) -> None:
    expected = two(ids()).logits
    assert (one(ids()).logits - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def everything_rotary(model: Any, **more: Any) -> Request:
    config = model.config
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return Request("mla", rope="longrope", kv_lora_rank=width, qk_rope_head_dim=width, **more)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3},
        {"rms_norm_eps": 1e-5, "rope_parameters": YARN},
    ],
    ids=["plain", "eps-tied", "eps-untied", "llama3", "yarn"],
)
def test_full_rank_llama_is_stock_deepseek_with_the_same_logits(tmp_path, heads, changes):
    model = source(tmp_path / "src", "llama", num_key_value_heads=heads, **changes)
    done = convert(str(tmp_path / "src"), tmp_path / "out", everything_rotary(model))
    found = loaded(tmp_path / "out")
    assert type(found).__module__.startswith("transformers.models.deepseek_v3")
    assert not done.plan.target.remote_code
    assert not list((tmp_path / "out").glob("*.py"))
    assert_same_logits(found, model)
    verify(tmp_path / "out")


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {}),
        ("llama", {"attention_bias": True}),
        ("seed_oss", {"head_dim": 12}),
        ("seed_oss", {"head_dim": 12, "attention_bias": False, "attention_out_bias": True}),
    ],
)
def test_full_rank_with_biases_fits_our_own_class(tmp_path, model_type, changes, heads):
    model = source(tmp_path / "src", model_type, num_key_value_heads=heads, **changes)
    convert(str(tmp_path / "src"), tmp_path / "out", everything_rotary(model))
    assert_same_logits(loaded(tmp_path / "out"), model)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "seed_oss"])
@pytest.mark.parametrize("parameters", [None, LLAMA3, LINEAR], ids=["default", "llama3", "linear"])
def test_a_latent_as_wide_as_the_input_is_exact_when_rotated_on_reading(tmp_path, model_type, parameters):
    changes = {} if parameters is None else {"rope_parameters": parameters}
    if model_type == "mistral":
        changes["sliding_window"] = None
    model = source(tmp_path / "src", model_type, **changes)
    rank = model.config.hidden_size + 1 if model_type in ("qwen2", "seed_oss") else model.config.hidden_size
    rank = min(rank, 2 * model.config.num_key_value_heads * 8)
    convert(str(tmp_path / "src"), tmp_path / "out", Request("mla", rope="re-rotate", kv_lora_rank=rank))
    assert_same_logits(loaded(tmp_path / "out"), model)


def test_full_rank_gpt2_is_exact(tmp_path):
    model = source(tmp_path / "src", "gpt2")
    convert(str(tmp_path / "src"), tmp_path / "out", Request("mla", kv_lora_rank=model.config.n_embd + 1))
    assert_same_logits(loaded(tmp_path / "out"), model)


def test_a_single_key_head_fits_the_grid_exactly(tmp_path):
    model = source(tmp_path / "src", "llama", num_key_value_heads=1, rms_norm_eps=1e-5)
    dims = model.config.hidden_size // model.config.num_attention_heads
    convert(str(tmp_path / "src"), tmp_path / "out", Request("mla", kv_lora_rank=dims, qk_rope_head_dim=dims))
    assert_same_logits(loaded(tmp_path / "out"), model)


def test_two_factor_queries_for_llama_cpp_change_nothing(tmp_path):
    model = source(tmp_path / "src", "llama", num_key_value_heads=1)
    dims = model.config.hidden_size // model.config.num_attention_heads
    request = Request("mla", kv_lora_rank=dims, qk_rope_head_dim=dims, engine="llama.cpp")
    convert(str(tmp_path / "src"), tmp_path / "out", request)
    found = loaded(tmp_path / "out")
    assert found.config.q_lora_rank == model.config.hidden_size
    assert_same_logits(found, model)


@pytest.mark.parametrize("parameters", [None, LINEAR, LLAMA3, YARN], ids=["default", "linear", "llama3", "yarn"])
def test_the_grid_is_the_sources_highest_frequencies(tmp_path, parameters):
    changes = {} if parameters is None else {"rope_parameters": parameters}
    model = source(tmp_path / "src", "llama", **changes)
    convert(str(tmp_path / "src"), tmp_path / "out", Request("mla", kv_lora_rank=8, qk_rope_head_dim=4))
    found, wanted = loaded(tmp_path / "out").model.rotary_emb, model.model.rotary_emb
    torch.testing.assert_close(found.inv_freq, wanted.inv_freq[:2], rtol=1e-6, atol=1e-9)
    assert found.attention_scaling == wanted.attention_scaling


CACHED = {
    "gpt2": Request("mla", kv_lora_rank=12),
    "llama": Request("mla", kv_lora_rank=8, qk_rope_head_dim=4),
    "llama-longrope": Request("mla", kv_lora_rank=8, qk_rope_head_dim=10, rope="longrope"),
    "llama-re-rotate": Request("mla", kv_lora_rank=12, rope="re-rotate"),
    "qwen2": Request("mla", kv_lora_rank=8, qk_rope_head_dim=4),
}


@pytest.mark.parametrize("case", CACHED)
def test_the_cache_holds_what_was_promised_and_generates_as_without_it(tmp_path, case):
    source(tmp_path / "src", case.partition("-")[0])
    done = convert(str(tmp_path / "src"), tmp_path / "out", CACHED[case])
    model = loaded(tmp_path / "out")
    tokens = ids(1, 9)
    with torch.no_grad():
        found = model.generate(
            tokens, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, min_new_tokens=6
        )
        whole = model(found.sequences[:, :-1], use_cache=False).logits[0, 8:].argmax(-1)
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], dim=1)
        mask = (torch.arange(13) >= 4).long()[None]
        left = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    assert found.sequences[0, 9:].tolist() == left[0, 13:].tolist() == whole.tolist()
    held = sum(t.nbytes for layer in cache_of(found).layers for t in (layer.keys, layer.values))
    assert held == done.plan.cache_after * 14
    assert inspect(str(tmp_path / "out")).cache_bytes_per_token == done.plan.cache_after
    assert done.plan.after[0].cache_values_per_token == sum(
        getattr(done.plan.after[0], name) for name in ("kv_lora_rank", "qk_rope_head_dim")
    )


@pytest.mark.parametrize("rope", ["grid", "longrope", "re-rotate"])
@pytest.mark.parametrize("parameters", [LLAMA3, YARN], ids=["llama3", "yarn"])
@pytest.mark.parametrize("absorbed", [True, False])
def test_padding_and_chunks_change_no_token_under_scaled_rotation(tmp_path, rope, parameters, absorbed):
    source(tmp_path / "src", "llama", rope_parameters=parameters)
    convert(str(tmp_path / "src"), tmp_path / "out", Request("mla", kv_lora_rank=12, rope=rope))
    model = uptrain.load(tmp_path / "out", dtype=torch.float32, absorbed=absorbed)
    tokens = ids(1, 40)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(46) >= 6).long()[None]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        alone = model.generate(tokens, **settings)
        whole = model(alone[:, :-1], use_cache=False).logits[0, 39:].argmax(-1)
        assert alone[0, 40:].tolist() == whole.tolist()
        assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 46:], alone[:, 40:])
        assert torch.equal(model.generate(tokens, prefill_chunk_size=16, **settings), alone)


def test_own_frequencies_are_in_the_config_and_the_manifest(tmp_path):
    source(tmp_path / "src", "llama")
    request = Request("mla", kv_lora_rank=8, qk_rope_head_dim=10, rope="longrope")
    done = convert(str(tmp_path / "src"), tmp_path / "out", request)
    stage = json.loads((tmp_path / "out" / "uptrain.json").read_text())["stages"][-1]
    slots = stage["latent"]["slots"]
    assert len(slots) == 5
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["rope_type"] == "longrope"
    wanted = [done.plan.attention.spec.inverse_frequencies[pair] for pair in slots]
    torch.testing.assert_close(loaded(tmp_path / "out").model.rotary_emb.inv_freq, torch.tensor(wanted))


def test_the_same_command_twice_gives_the_same_bytes(tmp_path):
    source(tmp_path / "src", "llama")
    for name in ("one", "two"):
        convert(str(tmp_path / "src"), tmp_path / name, CACHED["llama"])
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("model_type", "changes", "request_", "why"),
    [
        ("gpt2", {}, {"rope": "grid"}, "rotation|--rope"),
        ("gpt2", {}, {"kv_lora_rank": 1000}, "--kv-lora-rank 1000"),
        ("llama", {}, {"qk_rope_head_dim": 3}, "even"),
        ("llama", {}, {"qk_rope_head_dim": 64}, "--rope longrope"),
        ("llama", {}, {"rope": "re-rotate", "qk_rope_head_dim": 4}, "rotary key"),
        ("llama", {}, {"cache": 0.01}, "latent"),
        ("llama", {}, {"dtype": "float16"}, "float16"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "dynamic",
        ),
        ("gemma2", {}, {}, "gemma2"),
        ("mistral", {"sliding_window": 8}, {}, "window"),
        ("qwen2", {}, {"engine": "llama.cpp"}, r"llama\.cpp"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path, model_type, changes, request_, why):
    source(tmp_path / "src", model_type, **changes)
    with pytest.raises(UsageError, match=why) as error:
        convert(str(tmp_path / "src"), tmp_path / "out", Request("mla", **request_))
    assert "\n" not in error.value.message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"target": "gqa", "kv_lora_rank": 4}, "--kv-lora-rank"),
        ({"target": "mla", "groups": 2}, "--groups"),
        ({"target": "mla", "method": "mean"}, "--method mean"),
        ({"target": "mla", "cache": 0.5, "kv_lora_rank": 8}, "--cache"),
        ({"target": "mla", "cache": 25.0}, "--cache"),
        ({"target": "mla", "rope": "spiral"}, "--rope spiral"),
    ],
)
def test_options_that_contradict_each_other_are_refused(fields, why):
    with pytest.raises(UsageError, match=why):
        Request(**fields)


def test_a_latent_is_not_converted_again(tmp_path):
    source(tmp_path / "src", "llama")
    convert(str(tmp_path / "src"), tmp_path / "out", CACHED["llama"])
    with pytest.raises(UsageError, match="has a latent already"):
        convert(str(tmp_path / "out"), tmp_path / "again", Request("mqa"))


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_a_tied_head_becomes_a_tensor_of_its_own(tmp_path, eps):
    """vLLM's deepseek class never ties them: what it reads must be there."""
    model = source(tmp_path / "src", "llama", num_key_value_heads=2, rms_norm_eps=eps, tie_word_embeddings=True)
    convert(str(tmp_path / "src"), tmp_path / "out", everything_rotary(model))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, model.model.embed_tokens.weight)
    assert_same_logits(loaded(tmp_path / "out"), model)
