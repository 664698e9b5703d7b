"""What a config.json says of rotation, read without torch: as the family's own config and rotary classes read it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import TOKENS, load, request
from tests.oracle import pool_model
from tests.rotary_configs import LINEAR, PLAIN, SPELLINGS, YARN
from uptrain.architectures import description
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import ModelDescription
from uptrain.architectures.rope import inverse_frequencies
from uptrain.architectures.rope_parameters import EVERY, STATIC, WORDS, rotary_parameters, rotated_dims
from uptrain.architectures.validation import check_kinds
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.class_checks import rotation
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UptrainError
from uptrain.models.register import register
from uptrain.models.rotary_tables import rotary_tables

register()
Save = Callable[..., Path]
ROTATING = [
    name for name, entry in FAMILIES.items()
    if entry.position.rotates and not entry.keys.latent and not name.startswith("uptrain_")
]  # fmt: skip
WIDE = {"head_dim": 16, "hidden_size": 64, "n_embd": 64}
"""Heads of 16 dims: a quarter of them is a whole number of pairs."""


@cache
def sizes(model_type: str) -> dict[str, Any]:
    """Return a tiny config.json of a family that says nothing of rotation."""
    heads_key = FAMILIES[model_type].keys
    wide = {key: value for key, value in WIDE.items() if key in (heads_key.hidden_size, heads_key.head_dim)}
    config = json.loads(tiny_config(model_type, **wide).to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in WORDS}


@cache
def rotary_class(model_type: str) -> Any:
    """Return the class of the rotary module in a model of the family."""
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    return next(type(each) for each in model.modules() if type(each).__name__.endswith("RotaryEmbedding"))


def tables(config: dict[str, Any]) -> dict[str, tuple[torch.Tensor, float]]:
    """Return what a config's own classes compute by layer type: frequencies, and the factor of cosines and sines."""
    made = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config))
    if config["model_type"] in ("gptj", "codegen"):
        turned = create_sinusoidal_positions(2, config["rotary_dim"])[1, : config["rotary_dim"] // 2]
        return {EVERY: (torch.asin(turned), 1.0)}
    rotary = rotary_class(config["model_type"])(made)
    if hasattr(rotary, "inv_freq"):
        return {EVERY: (rotary.inv_freq, rotary.attention_scaling)}
    kinds = set(made.layer_types)
    return {kind: (getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling")) for kind in kinds}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")
@pytest.mark.parametrize("model_type", ROTATING)
def test_every_spelling_is_read_as_the_family_s_own_classes_read_it(model_type: str) -> None:
    """Or refused where they can't compute with it, or leave without a word what the config says."""
    entry, equal = FAMILIES[model_type], 0
    for name, said in SPELLINGS.items():
        config = {**sizes(model_type), **deepcopy(said)}
        try:
            theirs = tables(config)
        except Exception:  # whatever it is, no model of this class can be made of it
            continue
        try:
            specs = ModelDescription(family=entry, config=config, name="m").attention
            ours = rotary_parameters(entry, config, "m")
        except UptrainError:
            assert "share" in name or "by type" in name or entry.rotary.whole, name
            continue
        whole = specs[0].head_dim
        for kind, (speeds, factor) in theirs.items():
            parameters = ours[kind]
            dims, spread = rotated_dims(entry, parameters, whole, "m")
            if entry.keys.rotary_ndims:
                dims = spread = specs[0].rotary_ndims
            assert (dims or whole) == 2 * len(speeds), (name, kind)
            of_layers = {spec.rotary_ndims for spec in specs if spec.rotary_ndims != 0}
            assert entry.keys.alibi or {each or whole for each in of_layers} & {2 * len(speeds)}, (name, kind)
            if parameters["rope_type"] in STATIC and not (spread % 2 and parameters["rope_type"] == "yarn"):
                found = inverse_frequencies(parameters, config, spread, "m")
                torch.testing.assert_close(torch.tensor(found.values), speeds, rtol=1e-5, atol=0, msg=f"{name} {kind}")
                assert found.attention_factor == pytest.approx(factor), (name, kind)
            equal += 1
    assert equal >= (8 if entry.rotary.by_layer_type or entry.rotary.renamed else 25)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gptj", "gemma3_text", "laguna"])
def test_the_classes_are_asked_rightly(model_type: str) -> None:
    config = sizes(model_type)
    found, wanted = rotary_tables(config), tables(config)
    assert found.keys() == wanted.keys()
    for kind, (speeds, factor) in wanted.items():
        torch.testing.assert_close(torch.tensor(found[kind].short), speeds, rtol=1e-6, atol=0)
        assert found[kind].long == found[kind].short and found[kind].factor == factor


def test_tables_that_change_with_the_text_s_length_are_asked_for_long_texts_too() -> None:
    config = {**sizes("llama"), **SPELLINGS["longrope"]}
    table = rotary_tables(config)[EVERY]
    assert [one / other for one, other in zip(table.short, table.long, strict=True)] == pytest.approx([3 / 1.1] * 8)


def rewrite(folder: Path, **said: Any) -> Path:
    """Put what is `said` of rotation into a config.json in place of all that it says."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in WORDS}
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    return folder


REWRITTEN = [
    name for name in SPELLINGS if name not in ("odd share", "unknown type", "longrope", "longrope by its first name")
]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt_neox+no_use_parallel_residual"])
@pytest.mark.parametrize("name", [name for name in REWRITTEN if "by type" not in name and name != "proportional"])
def test_another_family_s_class_rotates_as_the_source_s(
    model_type: str, name: str, save_tiny: Save, tmp_path: Path
) -> None:
    source = rewrite(save_tiny(model_type, hidden_size=64), **SPELLINGS[name])
    convert(str(source), tmp_path / "out", request(2))
    wanted, found = (
        next(m for m in load(each).modules() if hasattr(m, "inv_freq")) for each in (source, tmp_path / "out")
    )
    torch.testing.assert_close(found.inv_freq, wanted.inv_freq)
    assert found.attention_scaling == pytest.approx(wanted.attention_scaling)
    with torch.no_grad():
        logits = pool_model(load(source), 2)(TOKENS).logits
        torch.testing.assert_close(load(tmp_path / "out")(TOKENS).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["gptj", "codegen"])
def test_a_rotation_that_is_no_setting_stays_what_it_is(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    said = {"rope_parameters": {**YARN, "rope_theta": 7.0}, "rope_scaling": LINEAR, "rope_theta": 9.0}
    source = rewrite(save_tiny(model_type), **said, rotary_emb_base=5.0, partial_rotary_factor=0.25)
    convert(str(source), tmp_path / "out", request(2))
    with torch.no_grad():
        logits = pool_model(load(source), 2)(TOKENS).logits
        torch.testing.assert_close(load(tmp_path / "out")(TOKENS).logits, logits, atol=1e-5, rtol=1e-5)


LATENTS = {
    "longrope": {"rope": "longrope", "qk_rope_head_dim": 64, "kv_lora_rank": 64},
    "re-rotate": {"rope": "re-rotate", "kv_lora_rank": 128},
}
UNREADABLE = ("by type of layer", "by type of layer, one silent", "by type of layer, scaled beside", "unknown type",
              "proportional", "share of an old section", "longrope", "longrope by its first name")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("rope", LATENTS)
@pytest.mark.parametrize("name", [name for name in SPELLINGS if name not in UNREADABLE])
def test_a_latent_that_keeps_all_rotates_as_the_source(
    model_type: str, rope: str, name: str, save_tiny: Save, tmp_path: Path
) -> None:
    if name == "dynamic" and rope == "longrope":
        pytest.skip("its frequencies fit no table")
    biases = {"attention_bias": False} if model_type == "llama" else {}
    source = rewrite(save_tiny(model_type, hidden_size=64, **biases), **SPELLINGS[name])
    convert(str(source), tmp_path / "out", Request("mla", **LATENTS[rope]))
    with torch.no_grad():
        wanted, found = load(source)(TOKENS).logits, load(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["by type of layer", "share of an old section"])
def test_what_the_source_s_class_cannot_compute_with_is_refused(name: str, save_tiny: Save, tmp_path: Path) -> None:
    source = rewrite(save_tiny("llama"), **SPELLINGS[name])
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        convert(str(source), tmp_path / "out", request(2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "target"), [("gpt_neox", request(2)), ("llama", Request("mla", rope="re-rotate"))]
)
def test_an_unknown_rope_type_is_refused(model_type: str, target: Request, save_tiny: Save, tmp_path: Path) -> None:
    source = rewrite(save_tiny(model_type), **SPELLINGS["unknown type"])
    with pytest.raises(UptrainError, match=r"(rope_type mine|KeyError: 'mine')"):
        convert(str(source), tmp_path / "out", target)
    assert not list(tmp_path.glob("out*"))


def test_a_plan_that_rotates_otherwise_than_the_classes_is_refused(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("gpt_neox")
    wrong = {EVERY: {"rope_type": "default", "rope_theta": 4_999.0, "partial_rotary_factor": 0.5}}
    monkeypatch.setattr(description, "rotary_parameters", lambda *_: wrong)
    with pytest.raises(CheckpointError, match="other inverse frequencies"):
        convert(str(source), tmp_path / "out", request(2))
    assert not list(tmp_path.glob("out*"))


def test_rotated_dims_that_the_class_counts_otherwise_are_refused(save_tiny: Save) -> None:
    """Factored heads would be mixed by dims that the rotation then pulls apart."""
    source, checkpoint, plan = plan_conversion(str(save_tiny("glm")), Request("gqa", 2, "svd"))
    rotation.check_rotation(checkpoint, plan, source.name)
    other = replace(plan, source=replace(plan.source))
    other.source.__dict__["attention"] = tuple(replace(spec, rotary_ndims=4) for spec in plan.before)
    with pytest.raises(CheckpointError, match="other inverse frequencies"):
        rotation.check_rotation(checkpoint, other, source.name)


def test_a_latent_s_own_table_is_asked_about_once_it_is_chosen(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = rotation._ask
    monkeypatch.setattr(rotation, "_ask", lambda configs, here: asked.append(len(configs)) or ask(configs, here=here))
    convert(str(save_tiny("llama", attention_bias=False)), tmp_path / "out", Request("mla", rope="longrope"))
    assert asked == [1, 2]


@pytest.mark.slow
def test_a_child_process_gives_the_same_answer() -> None:
    configs = [sizes("llama"), {**sizes("llama"), **SPELLINGS["unknown type"]}, {"model_type": "nobody's"}]
    command = [sys.executable, "-m", "uptrain.models.rotary_tables"]
    done = subprocess.run(command, input=json.dumps(configs), capture_output=True, text=True, check=True)
    known, reason, unknown = json.loads(done.stdout)
    assert known[EVERY]["short"] == list(rotary_tables(configs[0])[EVERY].short)
    assert "mine" in reason and unknown == {}


@pytest.mark.parametrize("name", ["transformers 4", "a type next to a plain section", "length outside"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt_neox+no_use_parallel_residual"])
def test_what_is_written_says_it_in_both_words_and_converts_again(
    model_type: str, name: str, save_tiny: Save, tmp_path: Path
) -> None:
    source = rewrite(save_tiny(model_type, hidden_size=64), **SPELLINGS[name])
    convert(str(source), tmp_path / "out", request(2))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    check_kinds(config, "out")
    parameters = config["rope_parameters"]
    assert config["partial_rotary_factor"] == parameters["partial_rotary_factor"]
    if config["model_type"] == "nemotron" and parameters["rope_type"] != "default":
        # That of transformers 4 knows no scaling: nothing is there that it could take for all.
        assert config["rope_theta"] is None and "rope_scaling" not in config
    else:
        assert config["rope_theta"] == parameters["rope_theta"]
        assert config.get("rope_scaling", {"rope_type": "default"}).items() <= parameters.items()
    convert(str(tmp_path / "out"), tmp_path / "again", request(1))
    speeds = [rotary_tables(json.loads((tmp_path / each / "config.json").read_text())) for each in ("out", "again")]
    assert speeds[0] == speeds[1]


def test_inspect_says_what_the_class_reads(save_tiny: Save) -> None:
    source = rewrite(save_tiny("gpt_neox"), rope_parameters=PLAIN, rope_scaling={"type": "linear", "factor": 4.0})
    found = inspect(str(source)).rope
    assert (found["rope_type"], found["factor"], found["rope_theta"]) == ("linear", 4.0, 10_000.0)


def test_factored_heads_count_the_dims_that_the_class_rotates(save_tiny: Save, tmp_path: Path) -> None:
    """Llama's class rotates all of a head, whatever the share: four heads in four groups of one lose nothing."""
    source = rewrite(save_tiny("llama"), **SPELLINGS["share inside and outside"])
    _, _, plan = plan_conversion(str(source), Request("gqa", 2, "svd"))
    assert {spec.rotary_ndims for spec in plan.before} == {None}
    model = tiny_model(tiny_config("llama"))
    pool_model(model, 2).save_pretrained(tmp_path / "shared")
    convert(str(rewrite(tmp_path / "shared", **SPELLINGS["share outside"])), tmp_path / "out", Request("gqa", 2, "svd"))
    with torch.no_grad():
        wanted, found = load(tmp_path / "shared")(TOKENS).logits, load(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
