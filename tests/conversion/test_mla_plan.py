"""What is planned of a latent: sizes, frequencies and configs, against what transformers' own classes make of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.rope import InverseFrequencies, inverse_frequencies
from uptrain.architectures.rope_parameters import EVERY, rotary_parameters
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.plan.mla import plan_mla
from uptrain.conversion.plan.planner import result_attention
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UsageError

Save = Callable[..., Path]
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]])
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": YARN,
    "yarn-factor": {**YARN, "attention_factor": 1.3},
    "yarn-mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn-smooth": {**YARN, "truncate": False, "beta_fast": 8, "beta_slow": 2},
}  # fmt: skip
every_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def assert_same_logits(one: PreTrainedModel, two: PreTrainedModel, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one(TOKENS).logits, two(TOKENS).logits, rtol=1e-5, atol=atol)


def llama(save_tiny: Save, heads: int, **changes: Any) -> Path:
    return save_tiny("llama", heads, **{"head_dim": 16, "attention_bias": False, **changes})


def read(config: dict[str, Any], dims: int) -> InverseFrequencies:
    return inverse_frequencies(rotary_parameters(FAMILIES["llama"], config, "m")[EVERY], config, dims, "m")


@every_rope
@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_frequencies_are_transformers_own(rope: dict[str, Any], old: bool) -> None:
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=64, max_position_embeddings=96, rope_parameters=dict(rope)))
    config: dict[str, Any] = {"max_position_embeddings": 96, "rope_parameters": rope}
    if old:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config = {"max_position_embeddings": 96, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    found = read(config, 64)
    torch.testing.assert_close(torch.tensor(found.values), theirs.inv_freq, rtol=2e-6, atol=0)
    assert found.attention_factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(
    ("rope", "error", "says"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, UsageError, "rope_type dynamic"),
        ({"rope_type": "linear"}, CheckpointError, "'factor' is missing"),
        ({"rope_type": "linear", "factor": "two"}, CheckpointError, "linear rotary parameters"),
    ],
)
def test_frequencies_that_cannot_be_told(rope: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read({"rope_parameters": rope}, 16)


@every_rope
@pytest.mark.parametrize("dims", [2, 4, 8, 12, 16])
def test_a_grid_is_the_source_s_highest_frequencies_or_refused(
    rope: dict[str, Any], dims: int, save_tiny: Save, tmp_path: Path
) -> None:
    source = llama(save_tiny, 2, rope_parameters=dict(rope))
    try:
        convert(str(source), tmp_path / "out", Request("mla", kv_lora_rank=8, qk_rope_head_dim=dims))
    except UsageError as error:
        # yarn's ramp is cut at the rotary part's own number of dims.
        assert rope["rope_type"] == "yarn" and dims < 8, error
        return
    wanted, found = load(source).model.rotary_emb, load(tmp_path / "out").model
    torch.testing.assert_close(found.rotary_emb.inv_freq, wanted.inv_freq[: dims // 2], rtol=2e-6, atol=0)
    assert found.rotary_emb.attention_scaling == pytest.approx(wanted.attention_scaling)
    attention = found.layers[0].self_attn
    assert attention.scaling == pytest.approx((16 + dims) ** -0.5), "the class has put a scale of its own on top"


@every_rope
def test_one_key_head_on_the_grid_is_exact_whatever_the_scaling(
    rope: dict[str, Any], save_tiny: Save, tmp_path: Path
) -> None:
    source = llama(save_tiny, 1, rope_parameters=dict(rope), rms_norm_eps=1e-5, tie_word_embeddings=True)
    convert(str(source), tmp_path / "out", Request("mla", kv_lora_rank=32, qk_rope_head_dim=16))
    assert_same_logits(load(tmp_path / "out"), load(source))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_unrotated_dims_keep_the_rotary_tables_factor(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    """All pairs but the first stand still in this source, so leaving them unrotated must lose nothing."""
    still = {**YARN, "factor": 1e8, "original_max_position_embeddings": 7, "attention_factor": 1.5}
    changes = {"attention_bias": False} if model_type == "llama" else {}
    source = save_tiny(model_type, 1, head_dim=16, rope_parameters=still, **changes)
    assert load(source).model.rotary_emb.inv_freq[1] < 1e-7
    convert(str(source), tmp_path / "out", Request("mla", kv_lora_rank=31, qk_rope_head_dim=2))
    assert_same_logits(load(tmp_path / "out"), load(source), atol=5e-5)


@every_rope
@pytest.mark.parametrize("heads", [1, 2])
def test_rotating_on_reading_is_exact_for_shared_heads_too(
    rope: dict[str, Any], heads: int, save_tiny: Save, tmp_path: Path
) -> None:
    source = llama(save_tiny, heads, rope_parameters=dict(rope))
    rank = min(48, 2 * heads * 16)
    done = convert(str(source), tmp_path / "out", Request("mla", kv_lora_rank=rank, rope="re-rotate"))
    assert done.plan.after[0].num_key_value_heads == heads
    assert_same_logits(load(tmp_path / "out"), load(source))


def test_a_gqa_gpt2_of_ours_becomes_a_latent(tmp_path: Path, save_tiny: Save) -> None:
    convert(str(save_tiny("gpt2")), tmp_path / "gqa", Request("gqa", 2))
    convert(str(tmp_path / "gqa"), tmp_path / "out", Request("mla", kv_lora_rank=48))
    assert "num_key_value_heads" not in open_checkpoint(tmp_path / "out").config
    assert_same_logits(load(tmp_path / "out"), load(tmp_path / "gqa"))


def test_a_head_stored_beside_the_embedding_it_is_tied_to(save_tiny: Save, tmp_path: Path) -> None:
    source = llama(save_tiny, 1, rms_norm_eps=1e-5, tie_word_embeddings=True)
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "out", Request("mla", kv_lora_rank=16, qk_rope_head_dim=16))
    assert_same_logits(load(tmp_path / "out"), load(source))


QUIET = {
    "llama": ("rms_norm_eps", "rope_parameters", "head_dim", "hidden_act", "bos_token_id", "eos_token_id",
              "tie_word_embeddings", "initializer_range", "attention_bias", "mlp_bias", "num_key_value_heads"),
    "qwen2": ("rms_norm_eps", "rope_parameters", "hidden_act", "bos_token_id", "eos_token_id", "sliding_window",
              "use_sliding_window", "layer_types", "max_window_layers"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", QUIET)
def test_what_a_config_leaves_out_is_the_source_family_s_default(
    model_type: str, save_tiny: Save, tmp_path: Path
) -> None:
    source = save_tiny(model_type, 4, **({"attention_bias": False} if model_type == "llama" else {}))
    edit(source, lambda config: [config.pop(key, None) for key in QUIET[model_type]])
    convert(str(source), tmp_path / "out", Request("mla", rope="longrope", kv_lora_rank=48, qk_rope_head_dim=48))
    assert_same_logits(load(tmp_path / "out"), load(source))
    before, after = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(tmp_path / "out")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "initializer_range"):
        assert getattr(after, key) == getattr(before, key), key


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "seed_oss"])
def test_a_config_that_says_nothing_is_planned_by_its_class(model_type: str) -> None:
    checkpoint = stub({"model_type": model_type, "sliding_window": None}, "model.layers.0.self_attn.")
    plan = planned(checkpoint, Request("mla"))
    theirs = AutoConfig.for_model(model_type, sliding_window=None)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    assert {key: plan.config[key] for key in keys} == {key: getattr(theirs, key) for key in keys}


def stub(config: dict[str, Any], base: str) -> Any:
    """Return what planning reads of a checkpoint, for models far too large to make."""
    names = [f"{base}{part}_proj.weight" for part in "qkvo"]
    return SimpleNamespace(
        config=config, tensors={name: TensorInfo(name, "BF16", (1, 1), "model.safetensors", 0, 2) for name in names}
    )


def planned(checkpoint: Any, request: Request) -> Any:
    family = FAMILIES[checkpoint.config["model_type"]]
    source = CheckpointDescription(family=family, config=checkpoint.config, name="m", checkpoint=checkpoint)
    return plan_mla(source, request)


LLAMA_2 = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "rms_norm_eps": 1e-5}
LLAMA_3 = {**LLAMA_2, "num_key_value_heads": 8}
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}


@pytest.mark.parametrize(
    ("config", "request_", "sizes"),
    [
        # What fast kernels take, wherever the source keeps at least twice that.
        (LLAMA_2, {}, (512, 64, 128)),
        (LLAMA_3, {}, (512, 64, 128)),
        (LLAMA_3, {"cache": 0.5}, (960, 64, 128)),
        (LLAMA_2, {"rope": "re-rotate"}, (4096, 0, 128)),
        (SMOLLM2, {}, (160, 32, 64)),
        (SMOLLM2, {"cache": 1 / 3}, (96, 32, 64)),
        (SMOLLM2, {"cache": 1 / 3, "qk_rope_head_dim": 16}, (112, 16, 64)),
        (SMOLLM2, {"rope": "re-rotate", "cache": 0.25}, (96, 0, 64)),
        (SMOLLM2, {"rope": "longrope", "kv_lora_rank": 192, "qk_rope_head_dim": 192}, (192, 192, 0)),
    ],
)
def test_sizes_follow_from_what_is_asked(
    config: dict[str, Any], request_: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    spec = planned(stub(config, "model.layers.0.self_attn."), Request("mla", **request_)).after[0]
    assert (spec.kv_lora_rank, spec.qk_rope_head_dim, spec.qk_nope_head_dim) == sizes


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "deepseek_v3": ("llama", {"attention_bias": False}, {"kv_lora_rank": 8, "qk_rope_head_dim": 4}),
    "deepseek_v3-longrope": ("llama", {"attention_bias": False}, {"kv_lora_rank": 8, "rope": "longrope"}),
    "deepseek_v3-two-factors": ("llama", {"attention_bias": False}, {"kv_lora_rank": 8, "engine": "llama.cpp"}),
    "uptrain_llama_mla": ("qwen2", {}, {"kv_lora_rank": 8, "qk_rope_head_dim": 4}),
    "uptrain_llama_mla-re-rotate": ("llama", {}, {"kv_lora_rank": 8, "rope": "re-rotate"}),
    "uptrain_gpt2_mla": ("gpt2", {}, {"kv_lora_rank": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_result_is_read_as_it_was_planned_and_not_converted_again(
    case: str, save_tiny: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_type, changes, request = CASES[case]
    source = save_tiny(model_type, **changes)
    done = convert(str(source), tmp_path / "out", Request("mla", **request))
    target, layers = result_attention(open_checkpoint(tmp_path / "out"), "out")
    sizes = [(spec.kind, spec.kv_lora_rank, spec.qk_rope_head_dim, spec.v_head_dim) for spec in layers]
    assert sizes == [(s.kind, s.kv_lora_rank, s.qk_rope_head_dim, s.v_head_dim) for s in done.plan.after]
    assert target.name == case.partition("-")[0] and bool(target.remote_code) == done.plan.target.remote_code.endswith(
        ".py"
    )
    with caplog.at_level(logging.WARNING, "transformers"):
        config = AutoConfig.from_pretrained(tmp_path / "out")
        names = set(load(tmp_path / "out").state_dict())
    assert not caplog.records
    stored = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert stored <= names and names - stored <= {"lm_head.weight"}
    if target.name == "deepseek_v3":
        assert config.rms_norm_eps == 1e-6 and config.rope_interleave and config.num_nextn_predict_layers == 0
    for again in (Request("mla"), Request("mqa")):
        with pytest.raises(UsageError, match="has a latent already"):
            plan_conversion(str(tmp_path / "out"), again)


def test_a_window_is_refused_even_where_only_the_class_knows_of_it(save_tiny: Save) -> None:
    source = save_tiny("mistral", 2, sliding_window=4096)
    for change in (lambda config: None, lambda config: config.pop("sliding_window")):
        edit(source, change)
        with pytest.raises(UsageError, match="sliding windows"):
            plan_conversion(str(source), Request("mla"))
    edit(source, lambda config: config.update(sliding_window=None))
    plan_conversion(str(source), Request("mla"))


def test_what_an_engine_cannot_load_is_refused(save_tiny: Save) -> None:
    source = llama(save_tiny, 2)
    for rope in ("longrope", "pre-rope"):
        with pytest.raises(UsageError, match=rf"llama\.cpp .*--rope {rope}"):
            plan_conversion(str(source), Request("mla", rope=rope, engine="llama.cpp"))


def test_text_without_calibration_is_a_contradiction() -> None:
    for target in ("gqa", "mla"):
        with pytest.raises(UsageError, match="--calibrate"):
            Request(target, method="svd", calibrate="text.txt")


def test_a_latent_costs_what_its_paper_says() -> None:
    """DeepSeek-V2 2024, table 1: 4.5 times a head's dims."""
    spec = AttentionSpec(128, 128, 128).latent(512, 64, 128, 128)
    assert spec.cache_values_per_token == 4.5 * 128 and spec.kind == "mla"
