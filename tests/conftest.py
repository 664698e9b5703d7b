"""Tiny real models of every family, written as their own class writes them."""

from __future__ import annotations

import atexit
import copy
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from uptrain.architectures.decoders import FAMILIES
from uptrain.conversion.class_checks import answers

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
# A shell's background job ignores Ctrl-C, and so would every process that a test starts in order to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

T5 = {
    "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0, "partial_rotary_factor": 0.5},
    },
    "gptj": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "codegen": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "opt": {
        "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "init_std": 0.15,
    },
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "use_cache": True},
    "gpt_neo": {
        "hidden_size": 48, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]], "window_size": 6,
    },
    "persimmon": {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "qk_layernorm": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0, "partial_rotary_factor": 0.5},
    },
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "bart": {
        "d_model": 48, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "init_std": 0.15,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
        "decoder_start_token_id": 2, "forced_eos_token_id": None,
    },
    "whisper": {
        "d_model": 48, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "init_std": 0.15,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
        "max_source_positions": 16, "max_target_positions": 64, "decoder_start_token_id": 2,
        "begin_suppress_tokens": None,
    },
    "falcon": {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "multi_query": False, "parallel_attn": False, "bias": True,
    },
}  # fmt: skip
LLAMA_LIKE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MIXED = ["sliding_attention", "full_attention"]
PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
EXTRA: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "vaultgemma": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "laguna": {
        "head_dim": 12, "num_attention_heads_per_layer": [4, 8], "layer_types": MIXED, "sliding_window": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": 8},
    "ministral": {"head_dim": 16, "sliding_window": 8},
    "seed_oss": {"head_dim": 16, "attention_bias": True},
    "helium": {"head_dim": 12},
    "ernie4_5": {"head_dim": 16},
    "glm": {"head_dim": 16, "attention_bias": True},
    "glm4": {"head_dim": 16},
    "nemotron": {"rope_parameters": PARTIAL},
    "cohere2": {"sliding_window": 8, "layer_types": MIXED, "head_dim": 12},
    "olmo3": {"sliding_window": 8, "layer_types": MIXED},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4},
    "exaone4": {"sliding_window": 8, "layer_types": MIXED},
    "hunyuan_v1_dense": {"head_dim": 16},
    "stablelm": {"use_qkv_bias": True, "rope_parameters": PARTIAL},
    "phi": {"rope_parameters": PARTIAL},
    "phi3": {"sliding_window": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": MIXED},
    "qwen2_moe": {
        "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "use_sliding_window": True, "sliding_window": 8,
    },
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "granite": {"attention_bias": True},
    "llama": {"attention_bias": True},
}  # fmt: skip


def tiny_config(model_type: str, num_key_value_heads: int | None = None, **changes: Any) -> Any:
    """Return a two-layer config of `model_type` with four query heads and a vocabulary of 64.

    "phi+qk_layernorm" is phi with that flag set, "gpt_neox+no_use_parallel_residual" gpt_neox with that one off.
    """
    model_type, *flags = model_type.split("+")
    changes = {**{flag.removeprefix("no_"): not flag.startswith("no_") for flag in flags}, **changes}
    values = dict(TINY.get(model_type, {**LLAMA_LIKE, **EXTRA.get(model_type, {})}))
    if model_type == "falcon":
        values["num_kv_heads"] = num_key_value_heads or 4
    elif model_type not in TINY:
        values["num_key_value_heads"] = num_key_value_heads or 4
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    values = {**tokens, "initializer_range": 0.15, **values, **changes}
    if values.get("layer_types"):
        count = values["num_hidden_layers"]
        values["layer_types"] = (values["layer_types"] * count)[:count]
    return AutoConfig.for_model(model_type, **values)


def auto_class(model_type: str) -> Any:
    return getattr(transformers, FAMILIES[model_type].auto_class)


_BUILT: dict[tuple[object, ...], tuple[PreTrainedModel, torch.Tensor]] = {}
"""Each tiny model that this process has built, and the state in which building it left torch's random numbers."""


def tiny_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """Return a float32 model with random weights of realistic scale, biases and norms included.

    A model that was asked for before is copied, not built again: the tests ask about 900 times for the same 55.
    """
    key = _key(config, seed)
    if key not in _BUILT:
        _BUILT[key] = (_build(config, seed), torch.get_rng_state())
    model, state = _BUILT[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def _key(config: Any, seed: int) -> tuple[object, ...]:
    return type(config), config.to_json_string(use_diff=False), config._attn_implementation, seed


def _build(config: Any, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = auto_class(config.model_type).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        if TINY.get(config.model_type) is T5:
            # Drawn with a deviation of 1 and tied, they would make models that say their input again.
            model.get_input_embeddings().weight.mul_(0.05)
    return model.float().eval()


_SAVED: dict[tuple[object, ...], Path] = {}


def save_model(
    folder: Path, config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
) -> Path:
    """Save `tiny_model(config, seed)` as `dtype` to `folder`, from a copy on disk where an equal one was saved."""
    model = tiny_model(config, seed)
    key = (*_key(config, seed), dtype, max_shard_size)
    if key not in _SAVED:
        _SAVED[key] = _store() / str(len(_SAVED))
        model.to(dtype).save_pretrained(_SAVED[key], max_shard_size=max_shard_size)
    return Path(shutil.copytree(_SAVED[key], folder, dirs_exist_ok=True))


@functools.cache
def _store() -> Path:
    """Return a folder of this process that goes away with it."""
    folder = tempfile.mkdtemp(prefix="uptrain-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need the package registry, except where `-m` names their marker."""
    asked = config.option.markexpr or ""
    left_out = [name for name in ("real", "wheel") if name not in asked]
    apart = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    config.hook.pytest_deselected(items=apart)
    items[:] = [item for item in items if item not in apart]


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UPTRAIN_CACHE", str(cache))
    # What a class needs is the same for all tests, and costs a process that imports torch to find out.
    classes = tmp_path_factory.getbasetemp().parent / "classes"
    classes.mkdir(exist_ok=True)
    (cache / "classes").symlink_to(classes)


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a tiny model and returns its folder."""

    def save(
        model_type: str, num_key_value_heads: int | None = None, *, name: str = "src", seed: int = 0,
        dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes: Any,
    ) -> Path:  # fmt: skip
        config = tiny_config(model_type, num_key_value_heads, **changes)
        return save_model(tmp_path / name, config, seed, dtype, max_shard_size)

    return save


@pytest.fixture
def uptrain_against(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command line in a process of its own against an endpoint."""

    def run(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_dummy",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        environment.pop("HF_HUB_OFFLINE", None)
        return subprocess.run(
            [sys.executable, "-m", "uptrain", *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(autouse=True, scope="session")
def own_answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ask classes again in every run of the tests: an answer that an earlier run stored would hide what asking does."""
    place, stored = tmp_path_factory.mktemp("classes"), answers._place
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_place", lambda: stored() if "UPTRAIN_CACHE" in os.environ else place)
        yield
