"""Everything that a plan refuses, one input each: without the guard, each of these goes on and fails here.

Checkpoints are a few kB of numpy, so that all of it takes seconds; what is refused is told apart by class and key noun.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.small import save_small, small_tensors
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.plan.planner import Plan, make_plan
from uptrain.conversion.request import Request, resolve_groups
from uptrain.errors import CheckpointError, UptrainError, UsageError

Kind = type[UptrainError]
Config = dict[str, Any]
GQA: Config = {"target": "gqa", "groups": 2}
MLA: Config = {"target": "mla"}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def planned(source: Path, request: Request) -> Plan:
    """Plan without asking the class, which would refuse these small sources for all that they leave out."""
    return make_plan(open_checkpoint(source), request, str(source))


def refuse(source: Path, asked: Config, error: Kind, noun: str) -> None:
    with pytest.raises(error, match=noun) as caught:
        planned(source, Request(**asked))
    assert type(caught.value) is error


LATENT = {"model_type": "deepseek_v3", "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 2}
CODEGEN = {"model_type": "codegen", "n_embd": 12, "n_layer": 2, "n_head": 6, "rotary_dim": 2}
CONFIGS: list[tuple[Config, Kind, str]] = [
    ({"model_type": "bert"}, UsageError, "encoder-only"),
    ({"model_type": "lama"}, UsageError, "'llama'"),
    ({"model_type": ["llama"]}, UsageError, "model_type"),
    ({"model_type": "gpt2", "add_cross_attention": True}, UsageError, "add_cross_attention"),
    ({"model_type": "mpt", "attn_config": {"qk_ln": True}}, UsageError, r"attn_config\.qk_ln"),
    ({"num_attention_heads": 0}, CheckpointError, "num_attention_heads"),
    ({"num_hidden_layers": "2"}, CheckpointError, "num_hidden_layers"),
    ({"hidden_size": 10}, CheckpointError, "10"),
    ({"num_key_value_heads": 3}, CheckpointError, "key/value heads"),
    (CODEGEN, CheckpointError, "blocks"),
    ({"num_hidden_layers": 10_001}, CheckpointError, "layers"),
    ({"num_attention_heads": 65_540, "head_dim": 2}, CheckpointError, "attention heads"),
    ({"head_dim": 65_540}, CheckpointError, "dims per head"),
    ({"rope_theta": "big"}, CheckpointError, "rope_theta"),
    ({"rope_scaling": [2.0]}, CheckpointError, "rope_scaling"),
    ({"rope_parameters": {"rope_theta": True}}, CheckpointError, "rope_theta"),
    ({"rms_norm_eps": None}, CheckpointError, "rms_norm_eps"),
    ({"max_position_embeddings": -1}, CheckpointError, "max_position_embeddings"),
    ({"model_type": "laguna", "head_dim": 2, "num_attention_heads_per_layer": [4]}, CheckpointError, "heads_per_layer"),
    (
        {"model_type": "laguna", "head_dim": 2, "num_attention_heads_per_layer": [4, 0]},
        CheckpointError,
        "heads_per_layer",
    ),
    ({**LATENT, "kv_lora_rank": 0}, CheckpointError, "kv_lora_rank"),
    ({**LATENT, "v_head_dim": None}, CheckpointError, "v_head_dim"),
    ({**LATENT, "qk_rope_head_dim": 0, "qk_nope_head_dim": 0}, CheckpointError, "dims"),
    (LATENT, UsageError, "latent"),
    (
        {"model_type": "mistral", "sliding_window": 4, "layer_types": ["sliding_attention"]},
        CheckpointError,
        "layer_types",
    ),
    (
        {"model_type": "gemma2", "head_dim": 2, "sliding_window": 4, "sliding_window_pattern": 0},
        CheckpointError,
        "sliding_window_pattern",
    ),
    ({"model_type": "gptj", "n_embd": 8, "n_layer": 2, "n_head": 4, "rotary_dim": 1}, CheckpointError, "rotary_dim"),
    ({"model_type": "gptj", "n_embd": 8, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, CheckpointError, "rotary_dim"),
    ({"model_type": "glm", "head_dim": 2, "partial_rotary_factor": 1.5}, CheckpointError, "partial_rotary_factor"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, CheckpointError, "no_rope_layers"),
]


@pytest.mark.parametrize(("config", "error", "noun"), CONFIGS)
def test_a_config_that_makes_no_sense(config: Config, error: Kind, noun: str, tmp_path: Path) -> None:
    refuse(save_small(tmp_path / "src", tensors=small_tensors(), **config), GQA, error, noun)


ALIKE = {"grouping": "similar"}
METHODS: list[tuple[Config, Config, str]] = [
    ({"model_type": "qwen3", "head_dim": 2}, {**GQA, "method": "calibrated"}, "normed"),
    ({"model_type": "olmoe", "clip_qkv": 8.0}, {**GQA, "method": "svd"}, "clip_qkv"),
    ({"model_type": "olmo", "clip_qkv": 8.0}, {**GQA, "method": "svd"}, "clip_qkv"),
    ({"model_type": "bart", "d_model": 8, "decoder_attention_heads": 4}, {**GQA, "method": "calibrated"}, "encoder"),
    ({"model_type": "olmo2"}, {**GQA, **ALIKE}, "weights"),
    ({"model_type": "bloom", "n_layer": 2, "n_head": 4}, {**GQA, **ALIKE}, "ALiBi"),
    ({"model_type": "laguna", "head_dim": 2, "num_key_value_heads": 4}, {**GQA, **ALIKE}, "gate"),
    ({"model_type": "qwen3", "head_dim": 2}, MLA, "normed|class"),
    ({"model_type": "starcoder2"}, MLA, "starcoder2"),
    ({}, {**GQA, "groups": 3}, "--groups 3"),
    ({}, {**GQA, "groups": 5}, "--groups 5"),
    ({}, {**GQA, "groups": 0}, "--groups 0"),
]


@pytest.mark.parametrize(("config", "asked", "noun"), METHODS)
def test_what_a_family_cannot_become(config: Config, asked: Config, noun: str, tmp_path: Path) -> None:
    refuse(save_small(tmp_path / "src", tensors=small_tensors(), **config), asked, UsageError, noun)


def test_a_family_of_one_head_or_all_has_no_groups(tmp_path: Path) -> None:
    linears = {"query_key_value": (24, 8), "dense": (8, 8)}
    tensors = {
        f"transformer.h.{layer}.self_attention.{name}.weight": random(*shape)
        for layer in range(2)
        for name, shape in linears.items()
    }
    source = save_small(tmp_path / "src", tensors=tensors, model_type="falcon", multi_query=False)
    refuse(source, GQA, UsageError, "new_decoder_architecture")
    planned(source, Request("mqa"))


ABSOLUTE = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 4}
LATENTS: list[tuple[Config, Config, str]] = [
    ({"model_type": "mistral", "sliding_window": 4}, {}, "window"),
    ({"attention_bias": True}, {"engine": "llama.cpp"}, r"llama\.cpp"),
    ({"mlp_bias": True}, {"engine": "llama.cpp"}, r"llama\.cpp"),
    ({}, {"engine": "llama.cpp", "rope": "longrope"}, r"llama\.cpp"),
    ({}, {"rope": "re-rotate", "qk_rope_head_dim": 2}, "rotary key"),
    ({}, {"kv_lora_rank": 100}, "--kv-lora-rank 100"),
    ({}, {"cache": 0.1}, "latent"),
    ({}, {"qk_rope_head_dim": 3}, "even"),
    ({}, {"qk_rope_head_dim": 4}, "even.*longrope"),
    ({}, {"qk_rope_head_dim": 0}, "even"),
    ({}, {"rope": "longrope", "qk_rope_head_dim": 10}, "even"),
    ({}, {"dtype": "float16"}, "float16"),
    ({"rms_norm_eps": 0}, {}, "rms_norm_eps"),
    ({}, {"q_lora_rank": 9}, "hidden_size 8"),
    ({}, {"rope": "re-rotate", "q_lora_rank": 4}, "q-lora-rank .*deepseek_v3"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "dynamic"),
]


@pytest.mark.parametrize(("config", "asked", "noun"), LATENTS)
def test_a_latent_that_no_class_holds(config: Config, asked: Config, noun: str, tmp_path: Path) -> None:
    sizes = {key: config[key] for key in ("hidden_size",) if key in config}
    source = save_small(tmp_path / "src", tensors=small_tensors(**sizes), **config)
    refuse(source, {**MLA, **asked}, UsageError, noun)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": -2.0},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "llama3", "factor": 2.0},
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "rope_theta": -1.0},
    ],
)
def test_rotary_parameters_that_say_no_frequencies(rope: Config, tmp_path: Path) -> None:
    source = save_small(tmp_path / "src", rope_parameters={"rope_theta": 10_000.0, **rope})
    refuse(source, MLA, CheckpointError, "rope|rotary|theta|factor")


def test_absolute_positions_have_no_rotary_options(tmp_path: Path) -> None:
    source = save_small(tmp_path / "src", tensors=gpt2(), **ABSOLUTE)
    planned(source, Request("mla"))
    for asked, noun in (({"rope": "grid"}, "--rope"), ({"qk_rope_head_dim": 2}, "--qk-rope-head-dim")):
        refuse(source, {**MLA, **asked}, UsageError, noun)
    refuse(source, {**MLA, "q_lora_rank": 4}, UsageError, "queries")


def test_yarn_whose_ramp_ends_elsewhere_needs_more_dims(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 512}
    sizes = {"hidden_size": 64, "max_position_embeddings": 4096}
    source = save_small(tmp_path / "src", **sizes, rope_parameters=yarn)
    refuse(source, {**MLA, "qk_rope_head_dim": 4, "kv_lora_rank": 8}, UsageError, "yarn")
    planned(source, Request("mla", qk_rope_head_dim=12, kv_lora_rank=8))


NAME = "model.layers.1.self_attn.k_proj.weight"
ODD = np.zeros((3, 3), np.float32)
TENSORS: list[tuple[str, Any, str]] = [
    (NAME, None, NAME),
    ("model.layers.0.self_attn.o_proj.weight", None, "o_proj"),
    (NAME, ODD, r"\[3, 3\]"),
    (NAME, np.zeros((8, 8), bool), f"{NAME} .*BOOL"),
    (NAME, np.zeros((8, 8), np.int64), f"{NAME} .*I64"),
    (NAME.replace("weight", "bias"), np.zeros(3, np.float32), "bias .*F32"),
    (NAME.replace("weight", "bias"), np.zeros(8, np.int64), "bias .*I64"),
]


@pytest.mark.parametrize(("name", "value", "noun"), TENSORS)
def test_attention_that_is_not_what_the_config_promises(name: str, value: Any, noun: str, tmp_path: Path) -> None:
    tensors = {**small_tensors(), name: value}
    if value is None:
        tensors.pop(name)
    refuse(save_small(tmp_path / "src", tensors=tensors), GQA, CheckpointError, noun)


def test_names_of_another_model_are_not_the_family_s(tmp_path: Path) -> None:
    tensors = {f"net.{name}": value for name, value in small_tensors().items()}
    refuse(save_small(tmp_path / "src", tensors=tensors), GQA, CheckpointError, r"self_attn\.o_proj")


def gpt2() -> dict[str, np.ndarray]:
    shapes = {"wte.weight": (16, 8), "wpe.weight": (32, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for layer in range(2):
        base = f"h.{layer}."
        shapes |= {f"{base}ln_{one}.{kind}": (8,) for one in (1, 2) for kind in ("weight", "bias")}
        for linear, sizes in {
            "attn.c_attn": (8, 24),
            "attn.c_proj": (8, 8),
            "mlp.c_fc": (8, 32),
            "mlp.c_proj": (32, 8),
        }.items():
            shapes |= {f"{base}{linear}.weight": sizes, f"{base}{linear}.bias": sizes[1:]}
    return {f"transformer.{name}": random(*shape) for name, shape in shapes.items()}


NEOX = {
    "model_type": "gpt_neox", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 4, "use_parallel_residual": True, "rotary_pct": 1.0,
}  # fmt: skip
LAYER = "gpt_neox.layers.0."


def neox(**changes: Any) -> dict[str, np.ndarray]:
    """Return GPT-NeoX's tensors by hand; a change to None leaves one out."""
    shapes = {"gpt_neox.embed_in.weight": (16, 8), "embed_out.weight": (16, 8)}
    shapes |= {f"gpt_neox.final_layer_norm.{kind}": (8,) for kind in ("weight", "bias")}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes |= {f"{LAYER}{norm}.{kind}": (8,) for kind in ("weight", "bias")}
    linears = {
        "attention.query_key_value": (24, 8),
        "attention.dense": (8, 8),
        "mlp.dense_h_to_4h": (16, 8),
        "mlp.dense_4h_to_h": (8, 16),
    }
    for linear, sizes in linears.items():
        shapes |= {f"{LAYER}{linear}.weight": sizes, f"{LAYER}{linear}.bias": sizes[:1]}
    found: dict[str, Any] = {name: random(*shape) for name, shape in shapes.items()}
    found.update(changes)
    return {name: value for name, value in found.items() if value is not None}


MOVED: list[tuple[Config, Config, str]] = [
    ({}, {f"{LAYER}mlp.fc1.weight": random(16, 8)}, r"both become .*mlp\.fc1\.weight"),
    ({}, {f"{LAYER}post_attention_layernorm.weight": None}, r"post_attention_layernorm\.weight is missing"),
    ({}, {f"{LAYER}mlp.dense_h_to_4h.weight": None}, r"dense_h_to_4h\.weight is missing"),
    ({}, {f"{LAYER}post_attention_layernorm.weight": random(9)}, "not the width"),
    ({}, {f"{LAYER}mlp.dense_h_to_4h.weight": random(128)}, "not the width"),
    ({}, {f"{LAYER}mlp.dense_h_to_4h.weight": np.zeros((16, 8), np.int64)}, "floating values are needed"),
    ({}, {f"{LAYER}input_layernorm.bias": None}, r"input_layernorm\.bias is missing"),
    (
        {"use_parallel_residual": False},
        {f"{LAYER}input_layernorm.weight": np.zeros(8, np.int64)},
        "floating values are needed",
    ),
    ({"rotary_pct": 0.5, "hidden_size": 24}, {}, "odd number"),
]


@pytest.mark.parametrize(("config", "changes", "noun"), MOVED)
def test_what_another_class_cannot_be_given(config: Config, changes: Config, noun: str, tmp_path: Path) -> None:
    """GPT-NeoX becomes phi, with norms folded into linears, or nemotron, with ones taken off the norms."""
    source = save_small(tmp_path / "src", tensors=neox(), **NEOX)
    planned(source, Request(**GQA))
    planned(save_small(source, tensors=neox(), **{**NEOX, "use_parallel_residual": False}), Request(**GQA))
    error = UsageError if noun == "odd number" else CheckpointError
    refuse(save_small(source, tensors=neox(**changes), **{**NEOX, **config}), GQA, error, noun)


def test_a_stream_is_scaled_by_floating_values_only(tmp_path: Path) -> None:
    """An rms_norm_eps that the latent's class can't have is made up for by scaling what joins the stream."""
    tensors = small_tensors()
    tensors["model.embed_tokens.weight"] = np.zeros((16, 8), np.int64)
    planned(save_small(tmp_path / "same", tensors=tensors), Request(**MLA))
    refuse(save_small(tmp_path / "src", tensors=tensors, rms_norm_eps=1e-5), MLA, CheckpointError, "floating values")


NORM = "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize(
    ("value", "noun"),
    [
        (None, f"{NORM} is missing"),
        (random(6), r"\[6\].*4 heads of 2"),
        (random(2, 4), "4 heads of 2"),
        (np.zeros(8, np.int64), "floating values are needed"),
    ],
)
def test_norms_of_each_head_fit_the_heads(value: Any, noun: str, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_norm.weight" for layer in range(2) for part in "qk"]
    tensors = {**small_tensors(), **{name: random(8) for name in names}}
    planned(save_small(tmp_path / "whole", tensors=tensors, model_type="olmo2"), Request(**GQA))
    tensors = {name: one for name, one in {**tensors, NORM: value}.items() if one is not None}
    refuse(save_small(tmp_path / "src", tensors=tensors, model_type="olmo2"), GQA, CheckpointError, noun)


REQUESTS: list[tuple[Config, str]] = [
    ({"target": "gqq"}, "--to gqq"),
    ({"method": "means"}, "--method means"),
    ({"grouping": "alike"}, "--grouping alike"),
    ({"dtype": "float8"}, "--dtype float8"),
    ({"method": "calibrated", "grouping": "similar"}, "--grouping similar"),
    ({"calibrate": "text.txt"}, "--calibrate"),
    ({"method": "calibrated", "calibration_tokens": 0}, "--calibration-tokens"),
    ({"method": "calibrated", "repair_steps": -1}, "--repair-steps"),
    ({"target": "mqa", "groups": 2}, "--groups 2"),
    ({"max_shard_size": 0}, "--max-shard-size"),
    *(({name: 4}, f"--{name.replace('_', '-')}") for name in ("kv_lora_rank", "qk_rope_head_dim", "q_lora_rank")),
    ({"cache": 0.5}, "--cache"),
    ({"rope": "grid"}, "--rope"),
    ({"key_weight": 1.0}, "--key-weight"),
    ({"engine": "llama.cpp"}, "--engine"),
    ({**MLA, "groups": 2}, "--groups 2"),
    ({**MLA, "method": "mean"}, "--method mean"),
    ({**MLA, "grouping": "similar"}, "--grouping"),
    ({**MLA, "engine": "vllm"}, "--engine vllm"),
    ({**MLA, "rope": "yarn"}, "--rope yarn"),
    ({**MLA, "kv_lora_rank": 0}, "--kv-lora-rank 0"),
    ({**MLA, "q_lora_rank": -1}, "--q-lora-rank -1"),
    ({**MLA, "cache": 0.0}, "--cache"),
    ({**MLA, "cache": 1.5}, "--cache"),
    ({**MLA, "cache": 0.5, "kv_lora_rank": 4}, "--cache and --kv-lora-rank"),
    ({**MLA, "key_weight": 0.0}, "--key-weight"),
    ({**MLA, "key_weight": float("inf")}, "--key-weight"),
]


@pytest.mark.parametrize(("asked", "noun"), REQUESTS)
def test_a_request_that_contradicts_itself(asked: Config, noun: str) -> None:
    with pytest.raises(UsageError, match=noun):
        Request(**asked)


def test_groups_are_resolved_against_the_heads_there_are(tmp_path: Path) -> None:
    spec = planned(save_small(tmp_path / "src"), Request()).before[0]
    assert [resolve_groups(Request(groups=groups), spec, "m") for groups in (None, 1, 4)] == [2, 1, 4]
    assert resolve_groups(Request("mqa"), spec, "m") == 1
