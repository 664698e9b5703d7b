"""A model type that uptrain doesn't know is named for what it is, never as a misspelling of another family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from uptrain.architectures import unknown_models
from uptrain.architectures.decoders import FAMILIES, NO_CACHE
from uptrain.architectures.description import describe
from uptrain.checkpoint.source import resolve
from uptrain.conversion import plan_conversion
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.models.auto_class import check_loadable
from uptrain.models.opened import open_config

OTHERS = sorted(set(CONFIG_MAPPING_NAMES) - set(FAMILIES) - NO_CACHE)


def refusal(config: dict[str, Any]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        describe(config, "m")
    return caught.value


def test_no_type_that_transformers_knows_is_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (unknown_models._known_to_transformers(), frozenset()):
        # Without transformers only what differs in case and separators is taken for a slip.
        monkeypatch.setattr(unknown_models, "_known_to_transformers", lambda known=known: known)
        wrong = [name for name in OTHERS if "Did you mean" in refusal({"model_type": name}).hint]
        assert wrong == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [("lama", "llama"), ("mistrall", "mistral"), ("gpt-neox", "gpt_neox"), ("GPT2", "gpt2"), ("qwen-3", "qwen3")],
)
def test_a_slip_is_still_mended(written: str, meant: str) -> None:
    assert f"Did you mean '{meant}'?" in refusal({"model_type": written}).hint


# Types of today's Hub that aren't converted; what each wraps is asked of transformers' own config class.
OTHER_WRAPPERS = [
    "blip-2", "florence2", "gemma3n", "glm4v", "janus", "kimi_k25", "llama4", "mllama", "qwen2_5_vl", "qwen2_vl",
    "qwen3_vl", "voxtral",
]  # fmt: skip


@pytest.mark.parametrize("model_type", OTHER_WRAPPERS)
def test_a_wrapper_is_named_with_its_text_tower(model_type: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type)
    config.save_pretrained(tmp_path)
    tower = config.get_text_config().model_type
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    for command in (lambda: inspect(str(tmp_path)), lambda: plan_conversion(str(tmp_path), Request("mqa"))):
        with pytest.raises(UsageError) as caught:
            command()
        assert model_type in caught.value.message and "Did you mean" not in str(caught.value)
        assert tower in caught.value.hint
        assert ("that uptrain knows" in caught.value.hint) == (tower in FAMILIES)


def test_a_wrapper_that_keeps_its_text_tower_s_values_beside_the_others() -> None:
    """As Qwen2-VL's config.json on the Hub: no text_config, and a section that doesn't say its type."""
    said = refusal({"model_type": "qwen2_vl", "hidden_size": 1536, "vision_config": {"depth": 32}})
    assert "qwen2_vl" in said.message and "vision_config" in said.message
    assert "qwen2." not in said.hint and "Did you mean" not in said.hint


def test_two_models_in_one_are_no_misspelling_either() -> None:
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(), transformers.BertConfig()
    )
    said = refusal(json.loads(config.to_json_string()))
    assert "encoder-decoder" in said.message and "bert" in said.message


def test_sections_of_other_kinds_are_no_models() -> None:
    config = {"model_type": "lama", "rope_scaling": {"type": "linear"}, "quantization_config": {"bits": 4}}
    assert "Did you mean 'llama'?" in refusal(config).hint


def test_loading_refuses_only_wrappers_that_have_no_language_model_s_class(tmp_path: Path) -> None:
    for model_type in ("llava", "gemma3", "qwen2_vl", "llama4"):
        AutoConfig.for_model(model_type).save_pretrained(tmp_path / model_type)
        (tmp_path / model_type / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="qwen2_vl"):
        check_loadable(open_config(resolve(str(tmp_path / "qwen2_vl"))))
    for model_type in ("llava", "gemma3", "llama4"):
        check_loadable(open_config(resolve(str(tmp_path / model_type))))
