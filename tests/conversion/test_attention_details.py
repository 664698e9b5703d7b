"""Every detail of attention carries over: switched on, it changes the source's logits and the result's alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import MIXED, tiny_config, tiny_model
from tests.conversion.test_families import EXPANDED, TOKENS, request
from tests.oracle import pool_model
from uptrain.architectures.description import describe_checkpoint
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion import convert, plan_conversion
from uptrain.errors import CheckpointError

Save = Callable[..., Path]


def scaled(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **values}}


SHORT = {"original_max_position_embeddings": 8}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SHORT}
LONG = {"short_factor": [1.0] * 6, "long_factor": [1.5] * 6, "factor": 4.0, **SHORT}
PLAIN = scaled("default")
HALF = {"partial_rotary_factor": 0.5}
DETAILS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # attention scale
    ("gemma2", {"query_pre_attn_scalar": 2}, {"query_pre_attn_scalar": 16}),
    ("gemma3_text", {"query_pre_attn_scalar": 2}, {"query_pre_attn_scalar": 16}),
    ("granite", {"attention_multiplier": 0.7}, {"attention_multiplier": 0.1}),
    ("hyperclovax", {"attention_multiplier": 0.7}, {}),
    ("gpt2", {"scale_attn_weights": False}, {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {}),
    ("mpt", {"attn_config": {"softmax_scale": 0.9}}, {}),
    # soft-capped scores and logits
    ("gemma2", {"attn_logit_softcapping": 0.5}, {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": 0.5}, {"final_logit_softcapping": None}),
    ("vaultgemma", {"attn_logit_softcapping": 0.5}, {"attn_logit_softcapping": None}),
    # windows, and layers that differ in them
    ("mistral", {"sliding_window": 5}, {"sliding_window": None}),
    ("phi3", {"sliding_window": 5}, {"sliding_window": None}),
    ("starcoder2", {"sliding_window": 5}, {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {}),
    ("gemma3_text", {"layer_types": MIXED, "sliding_window": 5}, {"layer_types": ["full_attention"]}),
    ("cohere2", {"layer_types": MIXED, "sliding_window": 5}, {"layer_types": ["full_attention"]}),
    ("gpt_neo", {"window_size": 5}, {"window_size": 64}),
    # layers that differ in rotation and in heads
    ("smollm3", {"no_rope_layers": [1, 0]}, {"no_rope_layers": [1, 1]}),
    ("laguna", {"num_attention_heads_per_layer": [8, 4]}, {}),
    # scaled rotation, past the length a model was trained on where that matters
    ("llama", scaled("linear", factor=2.0), PLAIN),
    ("llama", {**scaled("dynamic", factor=2.0), "max_position_embeddings": 8}, PLAIN),
    ("llama", scaled("yarn", factor=4.0, **SHORT), PLAIN),
    ("llama", scaled("llama3", **LLAMA3), PLAIN),
    ("llama", scaled("longrope", **LONG), PLAIN),
    ("qwen2", scaled("yarn", factor=4.0, **SHORT), PLAIN),
    ("phi3", scaled("longrope", **LONG), PLAIN),
    ("gpt_neox", scaled("dynamic", factor=2.0, **HALF) | {"max_position_embeddings": 8}, scaled("default", **HALF)),
    ("gpt_neox", scaled("yarn", factor=4.0, **HALF, **SHORT), scaled("default", **HALF)),
    # how much of a head is rotated
    *((name, scaled("default", partial_rotary_factor=0.34), PLAIN) for name in ("phi", "stablelm", "nemotron")),
    ("glm", scaled("default", partial_rotary_factor=0.25), PLAIN),
    ("gpt_neox", scaled("default", partial_rotary_factor=0.34), PLAIN),
    ("gptj", {"rotary_dim": 4}, {}),
    # biases on any of q, k, v and o
    ("llama", {"attention_bias": True}, {"attention_bias": False}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": True}, {"attention_bias": False}),
    ("stablelm", {"use_qkv_bias": True}, {"use_qkv_bias": False}),
    ("starcoder2", {"use_bias": False}, {}),
    ("gpt_neox", {"attention_bias": False}, {}),
    (EXPANDED, {"bias": True}, {"bias": False}),
    ("opt", {"enable_bias": False}, {}),
    # embeddings, and heads of another size than hidden_size / num_attention_heads
    *((name, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}) for name in ("gemma2", "mpt")),
    ("llama", {"head_dim": 20}, {}),
    ("gemma", {"head_dim": 20}, {"head_dim": 12}),
]


def ids(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)[:60] if value else "default"


def eager(folder: Path) -> PreTrainedModel:
    """Load a model that computes attention step by step: soft-capped scores exist nowhere else."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "on", "off"), DETAILS, ids=ids)
def test_a_detail_changes_the_result_as_it_changes_the_source(
    model_type: str, on: dict[str, Any], off: dict[str, Any], save_tiny: Save, tmp_path: Path
) -> None:
    source = save_tiny(model_type, **on)
    convert(str(source), tmp_path / "out", request(2))
    found, wanted = eager(tmp_path / "out")(TOKENS).logits, pool_model(eager(source), 2)(TOKENS).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    without = pool_model(tiny_model(tiny_config(model_type, **off)), 2)
    assert not torch.allclose(wanted, without(TOKENS).logits, atol=1e-3), "the detail makes no difference here"


def test_layers_that_differ_have_heads_and_rotated_dims_of_their_own(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("laguna"))
    model.save_pretrained(tmp_path / "src")
    specs = describe_checkpoint(open_checkpoint(tmp_path / "src"), "src").attention
    assert [spec.num_attention_heads for spec in specs] == [layer.self_attn.num_heads for layer in model.model.layers]
    frequencies = [getattr(model.model.rotary_emb, f"{kind}_inv_freq") for kind in model.config.layer_types]
    assert [spec.rotary_ndims or spec.head_dim for spec in specs] == [2 * len(table) for table in frequencies]
    assert len({spec.num_attention_heads for spec in specs}) == len({spec.rotary_ndims for spec in specs}) == 2


@pytest.mark.parametrize("listed", [[4], [4, "8"], [4, 0], 4])
def test_a_list_of_heads_that_fits_no_layers_is_told(listed: Any, save_tiny: Save) -> None:
    source = save_tiny("laguna")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_attention_heads_per_layer": listed}))
    with pytest.raises(CheckpointError, match="2 layers"):
        plan_conversion(str(source), request(2))


def test_heads_that_some_layer_can_not_share_are_told(save_tiny: Save) -> None:
    source = save_tiny("laguna")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_attention_heads_per_layer": [4, 6]}))
    with pytest.raises(CheckpointError, match=r"4 .*6 "):
        plan_conversion(str(source), request(2))
