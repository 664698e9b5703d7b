"""A model is described once: what its config says, as transformers' own class reads it, and only when asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from tests.conftest import tiny_config
from tests.wrapped import save_wrapper
from uptrain.architectures import description
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import ModelDescription, describe, describe_checkpoint
from uptrain.architectures.schema import Position
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.errors import CheckpointError, UsageError

Save = Callable[..., Path]
KNOWN = [name for name in FAMILIES if name in CONFIG_MAPPING and not name.startswith("uptrain_")]


@pytest.mark.parametrize("model_type", KNOWN)
def test_a_silent_config_has_the_sizes_of_the_config_class(model_type: str) -> None:
    made = CONFIG_MAPPING[model_type]()
    found = ModelDescription(family=FAMILIES[model_type], config={"model_type": model_type}, name="m")
    assert found.hidden_size == made.hidden_size
    assert found.vocab_size == made.vocab_size
    layers = found.size(FAMILIES[model_type].keys.num_hidden_layers)
    # T5 and its like count the layers of both halves alike; Whisper and BART say the decoder's apart.
    assert layers == getattr(made, "decoder_layers", made.num_hidden_layers)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "qwen3"])
def test_fresh_keys_have_the_deviation_that_the_class_draws(model_type: str) -> None:
    config = tiny_config(model_type, hidden_size=256, num_attention_heads=4, head_dim=64, initializer_range=0.07)
    model = AutoModelForCausalLM.from_config(config)
    found = describe(config.to_dict(), "m")
    fused = ("k_proj.weight", "query_key_value.weight", "c_attn.weight")
    weight = next(value for name, value in model.named_parameters() if name.endswith(fused))
    assert found.initializer_std == pytest.approx(float(weight.detach().std()), rel=0.1)


def test_a_description_asks_its_config_once_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    read = description.read_attention
    monkeypatch.setattr(description, "read_attention", lambda model: asked.append(model.name) or read(model))
    found = describe({"model_type": "llama", "num_attention_heads": 6, "hidden_size": 48}, "mine")
    assert asked == [] and found.position is Position.ROTARY
    assert found.attention is found.attention and asked == ["mine"]
    with pytest.raises(FrozenInstanceError):
        found.name = "another"  # type: ignore[misc]


def test_sizes_that_make_no_sense_are_refused_with_the_name_when_they_are_needed() -> None:
    found = describe({"model_type": "llama", "num_attention_heads": 5, "hidden_size": 48}, "mine")
    assert found.hidden_size == 48
    with pytest.raises(CheckpointError, match=r"mine.*hidden size 48"):
        _ = found.attention


@pytest.mark.parametrize(
    ("config", "noun"),
    [({"model_type": "bert"}, "encoder"), ({"model_type": "lama"}, "lama"), ({}, "model_type")],
)
def test_what_is_no_known_decoder_is_refused_at_once(config: dict[str, Any], noun: str) -> None:
    with pytest.raises(UsageError, match=noun):
        describe(config, "mine")


def test_another_family_s_class_reads_the_same_config() -> None:
    """Falcon has groups only with its new architecture; Llama's class always."""
    falcon = describe({"model_type": "falcon", "new_decoder_architecture": False}, "mine")
    assert not falcon.holds_groups(2) and falcon.holds_groups(1)
    assert falcon.as_family(FAMILIES["llama"]).holds_groups(2)


def test_alibi_replaces_the_family_s_position_and_fixes_the_heads_order() -> None:
    rotary, alibi = (describe({"model_type": "falcon", "alibi": flag}, "mine") for flag in (False, True))
    assert (rotary.position, alibi.position) == (Position.ROTARY, Position.ALIBI)
    assert not rotary.why_fixed_order and "ALiBi" in alibi.why_fixed_order
    assert {spec.rotary_ndims for spec in alibi.attention} == {0}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_names_of_an_open_checkpoint_are_those_of_its_tensors(model_type: str, save_tiny: Save) -> None:
    source = describe_checkpoint(open_checkpoint(save_tiny(model_type)), "mine")
    bases = [source.attention_name(layer) for layer in range(len(source.attention))]
    assert all(any(name.startswith(base) for name in source.tensors) for base in bases)
    assert not any(name.startswith(source.attention_name(len(bases))) for name in source.tensors)
    assert source.embeddings.table in source.tensors and source.quantization is None


def test_a_wrapper_s_description_is_its_language_model_s(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_wrapper(tmp_path / "s", "llava"))
    found, text = describe(checkpoint.config, "mine"), AutoConfig.from_pretrained(tmp_path / "s").text_config
    assert (found.family.model_type, found.wrapped_in) == ("llama", "llava")
    assert found.hidden_size == text.hidden_size and len(found.attention) == text.num_hidden_layers
    assert checkpoint.config["model_type"] == "llava"


@pytest.mark.parametrize("package", ["architectures", "checkpoint"])
def test_a_face_imports_its_modules_only_when_a_name_is_used(package: str) -> None:
    program = f"""
import sys
sys.modules["uptrain"] = __import__("types").ModuleType("uptrain")  # importing the package itself loads more
sys.modules["uptrain"].__path__ = ["{Path(description.__file__).parents[1]}"]
import uptrain.{package} as face
assert not [name for name in sys.modules if name.startswith("uptrain.{package}.")], sys.modules
assert "numpy" not in sys.modules
assert all(getattr(face, name) is not None for name in face.__all__)
assert {{*face.__all__}} <= {{*dir(face)}}
try:
    face.missing
except AttributeError as error:
    assert "missing" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)
