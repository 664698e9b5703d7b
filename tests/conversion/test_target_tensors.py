"""Results in the class of another family: what its own source can vary, each against the source's class, pooled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import TOKENS, load, request
from tests.gauge import scatter_heads
from tests.oracle import pool_model
from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.source import DEMO
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.plan.rewrites import half_split
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError
from uptrain.models.loading import load_tokenizer

Save = Callable[..., Path]
SEQUENTIAL = "gpt_neox+no_use_parallel_residual"
MOVED = ["gpt_neox", "gptj", "codegen", SEQUENTIAL]


def assert_pooled(source: Path, out: Path, groups: int = 2, **tolerance: float) -> None:
    tolerance = tolerance or {"atol": 1e-5, "rtol": 1e-5}
    convert(str(source), out, request(groups))
    _, loaded = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loaded.values()), loaded
    with torch.no_grad():
        wanted, found = pool_model(load(source), groups)(TOKENS).logits, load(out)(TOKENS).logits
    torch.testing.assert_close(found, wanted, **tolerance)


def rewrite_config(folder: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MOVED)
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_stock_class_is_there_and_no_other(
    model_type: str, tied: bool, save_tiny: Save, tmp_path: Path
) -> None:
    assert_pooled(save_tiny(model_type, tie_word_embeddings=tied), tmp_path / "out")


@pytest.mark.parametrize("model_type", MOVED)
def test_norms_and_linears_in_different_shards_still_meet(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny(model_type, max_shard_size="8KB")
    assert len(open_checkpoint(source).files) > 5
    assert_pooled(source, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt_neox", SEQUENTIAL])
def test_a_neox_config_from_before_transformers_5_keeps_its_rotation(
    model_type: str, save_tiny: Save, tmp_path: Path
) -> None:
    source = save_tiny(model_type)
    rewrite_config(source, ("rope_parameters",), rotary_pct=0.5, rotary_emb_base=5_000)
    assert_pooled(source, tmp_path / "said")
    written = json.loads((tmp_path / "said" / "config.json").read_text())["rope_parameters"]
    assert written == {"rope_type": "default", "rope_theta": 5_000, "partial_rotary_factor": 0.5}
    source = save_tiny(model_type, name="silent", hidden_size=64, rope_parameters=None)
    rewrite_config(source, ("rope_parameters",))
    assert_pooled(source, tmp_path / "silent-out")


def test_scaled_rotations_carry_over(save_tiny: Save, tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    assert_pooled(save_tiny("gpt_neox", rope_parameters=scaled), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neox", {"attention_bias": False}),
        (SEQUENTIAL, {"attention_bias": False, "layer_norm_eps": 0.1, "hidden_act": "relu"}),
        ("gpt_neox", {"hidden_act": "relu", "layer_norm_eps": 0.1}),
        ("gptj", {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 0.1}),
        ("codegen", {"rotary_dim": 12}),
    ],
)
def test_settings_keep_their_meaning_under_the_target_s_names(
    model_type: str, changes: dict[str, Any], save_tiny: Save, tmp_path: Path
) -> None:
    assert_pooled(save_tiny(model_type, **changes), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MOVED)
def test_what_an_old_config_leaves_out_is_the_source_class_own_default(
    model_type: str, save_tiny: Save, tmp_path: Path
) -> None:
    source = save_tiny(model_type)
    sizes = open_checkpoint(source).config
    silent = ("hidden_act", "activation_function", "layer_norm_eps", "layer_norm_epsilon", "n_inner", "attn_pdrop")
    rewrite_config(source, tuple(key for key in silent if key in sizes))
    assert_pooled(source, tmp_path / "out")


def test_a_neox_checkpoint_of_the_hub_s_form(save_tiny: Save, tmp_path: Path) -> None:
    """Masks and frequencies saved as tensors, as EleutherAI's own files have them."""
    source = save_tiny("gpt_neox")
    state = load_file(source / "model.safetensors")
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention."
        state[f"{attention}bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        state[f"{attention}masked_bias"] = torch.tensor(-1e9)
        state[f"{attention}rotary_emb.inv_freq"] = torch.ones(3)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert_pooled(source, tmp_path / "out", groups=1)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MOVED)
def test_bfloat16_stays_bfloat16_and_near(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny(model_type, dtype=torch.bfloat16)
    assert_pooled(source, tmp_path / "out", atol=0.15, rtol=0.05)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_eight_heads_in_blocks_are_the_heads_the_module_sees(save_tiny: Save, tmp_path: Path) -> None:
    """Its class reads heads four blocks at a time: pooling pairs by hand in its own rows must give the same logits."""
    source = save_tiny("codegen", n_head=8, rotary_dim=4)
    state = load_file(source / "model.safetensors")
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.qkv_proj.weight"
        rows = state[name].reshape(4, 3, 2, 6, 48).clone()  # block, query/value/key, head in the block, dim
        rows[:, 1:] = rows[:, 1:].mean(2, keepdim=True)
        state[name] = rows.reshape(144, 48)
    convert(str(source), tmp_path / "out", request(4))
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "out")(TOKENS).logits, load(source)(TOKENS).logits, atol=1e-5, rtol=1e-5
        )


@given(st.integers(0, 4), st.integers(0, 3), st.integers(0, 9))
def test_reordered_dims_rotate_by_halves_as_they_did_by_neighbours(pairs: int, rest: int, position: int) -> None:
    dims, angles = 2 * pairs + rest, position * 0.7 ** np.arange(pairs)
    if dims == 0:
        return
    q, k = np.random.default_rng(position).standard_normal((2, 1, dims, 1))
    halves = half_split(LayerHeads(q=Heads(q), k=Heads(k)), 2 * pairs)

    def turned(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        x, out = x[0, :, 0], x[0, :, 0].copy()
        out[first] = x[first] * np.cos(angles) - x[second] * np.sin(angles)
        out[second] = x[second] * np.cos(angles) + x[first] * np.sin(angles)
        return out

    even, low = np.arange(0, 2 * pairs, 2), np.arange(pairs)
    by_neighbours = turned(q, even, even + 1) @ k[0, :, 0]
    by_halves = turned(halves.part("q").weight, low, low + pairs) @ halves.part("k").weight[0, :, 0]
    np.testing.assert_allclose(by_halves, by_neighbours, atol=1e-12)


@pytest.mark.parametrize(
    ("model_type", "values", "said"),
    [
        ("codegen", {"n_head": 6}, "6 attention heads.* 4 blocks"),
        ("gptj", {"rotary_dim": 14}, "rotary_dim .*14.* 12 dims"),
        ("gptj", {"rotary_dim": 7}, "rotary_dim .*7.* 12 dims"),
    ],
)
def test_sizes_that_cannot_be_are_told(model_type: str, values: dict[str, int], said: str, save_tiny: Save) -> None:
    source = save_tiny(model_type)
    rewrite_config(source, **values)
    with pytest.raises(CheckpointError, match=said):
        plan_conversion(str(source), request(2))


def test_a_missing_norm_is_named(save_tiny: Save) -> None:
    source = save_tiny("gpt_neox")
    state = load_file(source / "model.safetensors")
    del state["gpt_neox.layers.1.post_attention_layernorm.bias"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gpt_neox\.layers\.1\.post_attention_layernorm\.bias"):
        plan_conversion(str(source), request(2))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MOVED)
def test_calibrated_heads_land_in_the_target_too(model_type: str, tmp_path: Path) -> None:
    """Heads that are one in disguise are found on text as well, and give the source's logits back."""
    tokenizer = load_tokenizer(DEMO)
    model = tiny_model(tiny_config(model_type, vocab_size=len(tokenizer)))
    scatter_heads(model, 2).save_pretrained(tmp_path / "src")
    tokenizer.save_pretrained(tmp_path / "src")
    settings = Request("gqa", 2, "calibrated", calibration_tokens=512, repair_steps=0)
    convert(str(tmp_path / "src"), tmp_path / "out", settings)
    with torch.no_grad():
        wanted, found = model(TOKENS).logits, load(tmp_path / "out")(TOKENS).logits
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()
