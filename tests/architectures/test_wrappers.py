"""The language model in a wrapper is converted in place: the result is the wrapper's own class, pooled in place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import uptrain
from tests.hub_server import serve
from tests.wrapped import load, logits, picture_of, pool_language_model, save_wrapper, tensors, tiny_wrapper, words
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import ModelDescription, describe_checkpoint
from uptrain.architectures.wrappers import WRAPPERS, tower_in
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.source import resolve
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UsageError
from uptrain.evaluation import evaluate
from uptrain.models.checks import check_heads
from uptrain.models.opened import open_config
from uptrain.publishing.hub.card import build_card
from uptrain.publishing.hub.licence import Licence
from uptrain.publishing.hub.subject import CardSubject
from uptrain.publishing.page.models import models_in
from uptrain.training.recipe import Recipe
from uptrain.training.run import train
from uptrain.workflows import sweep

THREE = ("gemma3", "llava", "mistral3")
NEAR = 1e-5


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; `...` removes a key."""
    config = {key: value for key, value in {**config_of(folder), **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def store(folder: Path, found: dict[str, Tensor]) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "model.safetensors", {"format": "pt"})


def away(one: PreTrainedModel, other: PreTrainedModel, **inputs: Tensor) -> float:
    return float((logits(one, **inputs) - logits(other, **inputs)).abs().max())


def assert_pooled(source: Path, result: Path, groups: int) -> None:
    """Assert that a result says of a text and of a picture what the source does with its heads pooled in place."""
    oracle, found = pool_language_model(load(source), groups), load(result)
    shown = picture_of(found)
    assert away(found, oracle, input_ids=words()) <= NEAR
    assert away(found, oracle, **shown) <= NEAR
    # The picture is looked at, and pooling changes something.
    assert away(load(source), found, **shown) > 0.1
    other = {**shown, "pixel_values": -shown["pixel_values"]}
    assert float((logits(found, **shown) - logits(found, **other)).abs().max()) > 0.1


def test_the_docs_name_every_type() -> None:
    text = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    listed = text.partition("<!-- wrappers -->")[2].partition("<!-- /wrappers -->")[0]
    assert sorted(listed.replace(",", " ").split()) == sorted(WRAPPERS)
    assert f"[{len(WRAPPERS)} types]" in (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("model_type", sorted(WRAPPERS))
def test_the_table_says_what_the_class_assumes(model_type: str) -> None:
    wrapper, made = WRAPPERS[model_type], AutoConfig.for_model(model_type)
    assert type(made) in AutoModelForImageTextToText._model_mapping
    assert made.get_text_config().model_type == wrapper.text
    assert made.tie_word_embeddings == wrapper.tied
    tied = type(made)(tie_word_embeddings=False, text_config={"model_type": wrapper.text, "tie_word_embeddings": True})
    assert tied.tie_word_embeddings == wrapper.tied_by_section


@pytest.mark.parametrize("model_type", sorted(WRAPPERS))
def test_a_section_that_is_silent_means_what_the_class_makes_of_it(model_type: str) -> None:
    section = {"model_type": WRAPPERS[model_type].text}
    made = type(AutoConfig.for_model(model_type))(text_config=dict(section)).get_text_config()
    tower = tower_in({"model_type": model_type, "text_config": section})
    assert tower is not None
    family = FAMILIES[tower.config["model_type"]]
    layers = ModelDescription(family=family, config=tower.config, name="m").attention
    assert len(layers) == made.num_hidden_layers
    assert layers[0].num_attention_heads == made.num_attention_heads
    assert layers[0].num_key_value_heads == made.num_key_value_heads


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(WRAPPERS))
def test_a_result_is_the_wrapper_pooled_in_place(model_type: str, tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", model_type)
    done = convert(str(source), tmp_path / "o", Request("gqa", 2))
    assert_pooled(source, tmp_path / "o", 2)
    before, after = tensors(source), tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key.split(".")[-2] for key in changed} == {"k_proj", "v_proj"}
    assert all("vision" not in key and "visual" not in key for key in changed)
    assert len([key for key in changed if key.endswith("k_proj.weight")]) == 2
    said = config_of(source)
    said["text_config"]["num_key_value_heads"] = 2
    assert config_of(tmp_path / "o") == said
    assert done.plan.cache_after * 4 == done.plan.cache_before


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llava", "mistral3", "idefics3"])
def test_svd_loses_nothing_where_heads_are_the_same(model_type: str, tmp_path: Path) -> None:
    model = pool_language_model(tiny_wrapper(model_type), 4)
    model.save_pretrained(tmp_path / "s")
    convert(str(tmp_path / "s"), tmp_path / "o", Request("gqa", 4, "svd"))
    assert away(load(tmp_path / "o"), model, input_ids=words()) <= 2 * NEAR
    assert away(load(tmp_path / "o"), model, **picture_of(model)) <= 2 * NEAR


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3", "llava", "llava_onevision", "idefics3"])
def test_names_as_the_class_has_them_are_read_too(model_type: str, tmp_path: Path) -> None:
    tiny_wrapper(model_type).save_pretrained(tmp_path / "s", save_original_format=False, max_shard_size="200KB")
    assert not any(key.startswith("language_model") for key in tensors(tmp_path / "s"))
    convert(str(tmp_path / "s"), tmp_path / "o", Request("mqa"))
    assert_pooled(tmp_path / "s", tmp_path / "o", 1)
    assert tensors(tmp_path / "s").keys() == tensors(tmp_path / "o").keys()


def test_a_body_without_a_head_stays_one(tmp_path: Path) -> None:
    tiny_wrapper("llava").model.save_pretrained(tmp_path / "s")
    convert(str(tmp_path / "s"), tmp_path / "o", Request("gqa", 2))
    assert config_of(tmp_path / "o")["architectures"] == ["LlavaModel"]
    result, info = transformers.AutoModel.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not info["missing_keys"]
    oracle = transformers.AutoModel.from_pretrained(tmp_path / "s")
    for layer in oracle.language_model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = linear.weight.data.view(2, 4, 8, 64)
            heads.copy_(heads.mean(1, keepdim=True).expand_as(heads))
    with torch.no_grad():
        states = [model(input_ids=words()).last_hidden_state for model in (result.eval(), oracle.eval())]
    assert float((states[0] - states[1]).abs().max()) <= NEAR


@pytest.mark.slow
@pytest.mark.parametrize("said", ["beside", "inside", "nowhere"])
@pytest.mark.parametrize("head", ["absent", "equal", "different", "alone"])
@pytest.mark.parametrize("model_type", THREE)
def test_the_head_is_what_transformers_makes_of_the_source(
    model_type: str, head: str, said: str, tmp_path: Path
) -> None:
    source = save_wrapper(tmp_path / "s", model_type, tie_word_embeddings=True)
    found, section = tensors(source), config_of(source)["text_config"]
    names = {name.rpartition("embed_tokens")[0]: value for name, value in found.items() if "embed_tokens" in name}
    ((base, table),) = names.items()
    if head != "absent":
        name = f"{base.removesuffix('model.')}lm_head.weight"
        found[name] = torch.randn_like(table) if head == "different" else table.clone()
        if head == "alone":
            del found[f"{base}embed_tokens.weight"]
        store(source, found)
    section.pop("tie_word_embeddings", None)
    edit(
        source,
        text_config={**section, **({"tie_word_embeddings": True} if said == "inside" else {})},
        tie_word_embeddings=True if said == "beside" else ...,
    )
    model, info = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True)
    if info["missing_keys"]:
        with pytest.raises(CheckpointError, match="embed_tokens" if head == "alone" else "lm_head"):
            plan_conversion(str(source), Request("gqa", 2))
        return
    convert(str(source), tmp_path / "o", Request("gqa", 2))
    assert_pooled(source, tmp_path / "o", 2)
    assert tensors(source).keys() == tensors(tmp_path / "o").keys()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert inspect(str(source)).tied_embeddings == tied


def test_another_dtype_is_written_everywhere(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "llava")
    convert(str(source), tmp_path / "o", Request("gqa", 2, dtype="bfloat16"))
    assert {value.dtype for value in tensors(tmp_path / "o").values()} == {torch.bfloat16}
    said = config_of(tmp_path / "o")
    assert said["dtype"] == "bfloat16"
    assert {said[key].get("dtype", "bfloat16") for key in ("text_config", "vision_config")} == {"bfloat16"}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "o", dtype="auto")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_inspect_says_what_the_language_model_is(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    found = inspect(str(save_wrapper(tmp_path / "s", "gemma3", text={"layer_types": types})))
    assert (found.model_type, found.wrapped_in) == ("gemma3_text", "gemma3")
    assert (found.sliding_window, found.sliding_layers) == (6, 1)
    assert found.tied_embeddings and found.num_key_value_heads == 8 and found.dtype == "F32"
    assert [(each.target, each.num_key_value_heads) for each in found.options] == [("gqa", 4), ("gqa", 2), ("mqa", 1)]
    assert {each.host for each in found.options} == {"gemma3"}


@pytest.mark.slow
def test_neither_torch_nor_transformers_is_needed_to_plan_and_pool(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "mistral3")
    program = """
import sys
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *rest: None if name in ("torch", "transformers", "accelerate") else found(name, *rest)
sys.modules.update(torch=None, transformers=None, accelerate=None)
from uptrain.conversion.run.convert import convert
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
assert inspect(sys.argv[1]).wrapped_in == "mistral3"
convert(sys.argv[1], sys.argv[2], Request("gqa", 2))
"""
    subprocess.run([sys.executable, "-c", program, str(source), str(tmp_path / "o")], check=True)
    assert_pooled(source, tmp_path / "o", 2)


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_the_wrapper_s_class_is_asked_for_its_weights(part: str, tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "llava")
    lost = next(key for key in tensors(source) if part in key and key.endswith(".weight"))
    store(source, {key: value for key, value in tensors(source).items() if key != lost})
    with pytest.raises(CheckpointError, match="LlavaForConditionalGeneration") as caught:
        plan_conversion(str(source), Request("gqa", 2))
    assert part in caught.value.message
    with pytest.raises(CheckpointError, match=part):
        uptrain.load(source)


def test_a_layer_beyond_the_section_is_named(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "llava")
    edit(source, text_config={**config_of(source)["text_config"], "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"layers\.1\."):
        plan_conversion(str(source), Request("gqa", 2))
    with pytest.raises(CheckpointError, match=r"layers\.1\."):
        uptrain.load(source)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_codes_in_the_language_model_are_named(place: str, tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "llava")
    found = tensors(source)
    for key in [key for key in found if "language_model" in key and "_proj.weight" in key]:
        base = key.removesuffix("weight")
        found[f"{base}qweight"] = torch.zeros(8, 64, dtype=torch.int32)
        found[f"{base}g_idx"] = torch.zeros(64, dtype=torch.int32)
        del found[key]
    store(source, found)
    said = {"quant_method": "gptq", "bits": 4}
    if place == "beside":
        edit(source, quantization_config=said)
    else:
        edit(source, text_config={**config_of(source)["text_config"], "quantization_config": said})
    with pytest.raises(CheckpointError, match="GPTQ"):
        plan_conversion(str(source), Request("gqa", 2))
    assert "GPTQ" in inspect(str(source)).quantised


def test_a_quantized_part_that_sees_goes_along(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "llava")
    found = tensors(source)
    key = next(key for key in found if "vision" in key and key.endswith("fc1.weight"))
    base = key.removesuffix("weight")
    found[f"{base}qweight"], found[f"{base}g_idx"] = (torch.ones(4, 32).int(), torch.ones(32).int())
    del found[key]
    store(source, found)
    edit(source, quantization_config={"quant_method": "gptq", "bits": 4})
    convert(str(source), tmp_path / "o", Request("gqa", 2))
    assert torch.equal(tensors(tmp_path / "o")[f"{base}qweight"], found[f"{base}qweight"])
    assert config_of(tmp_path / "o")["quantization_config"] == {"quant_method": "gptq", "bits": 4}


def test_what_a_wrapper_can_t_become_is_said(tmp_path: Path) -> None:
    source = str(save_wrapper(tmp_path / "s", "llava"))
    with pytest.raises(UsageError, match="no place in a llava"):
        plan_conversion(source, Request("mla", cache=0.5))
    with pytest.raises(UsageError, match="inside a llava"):
        plan_conversion(source, Request("gqa", 2, "calibrated"))
    text = {**config_of(tmp_path / "s")["text_config"], "model_type": "opt"}
    for changes, words_of_it in (
        ({"text_config": text}, "class"),
        ({"text_config": {**text, "model_type": "mamba"}}, "llava"),
        ({"text_config": ...}, "text_config"),
        ({"text_config": None}, "text_config"),
        ({"text_config": {**text, "model_type": "llama", "num_key_value_heads": 3}}, "divide"),
    ):
        edit(tmp_path / "s", **changes)
        with pytest.raises((UsageError, CheckpointError), match=words_of_it):
            plan_conversion(source, Request("gqa", 2))


def test_eval_train_and_sweep_refuse_wrappers_before_anything_is_written(tmp_path: Path) -> None:
    source = str(save_wrapper(tmp_path / "s", "gemma3"))
    data = [{"files": [__file__]}]
    recipe = Recipe.model_validate({"model": source, "output": tmp_path / "out", "data": data, "steps": 1})
    for refused in (
        lambda: evaluate(source),
        lambda: train(recipe),
        lambda: sweep(source, ["mqa"], out=tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="gemma3_text"):
            refused()
    assert not (tmp_path / "out").exists()


def test_load_gives_the_wrapper_s_class(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "mistral3")
    convert(str(source), tmp_path / "o", Request("gqa", 2))
    model = uptrain.load(tmp_path / "o")
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"
    assert away(model, pool_language_model(load(source), 2), input_ids=words()) <= NEAR


def test_the_processor_goes_along_and_the_card_names_it(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "llava")
    beside = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "special_tokens_map.json")
    for name in beside:
        (source / name).write_text("{}")
    convert(str(source), tmp_path / "o", Request("gqa", 2))
    assert all((tmp_path / "o" / name).read_text() == "{}" for name in beside)
    stages = json.loads((tmp_path / "o" / "uptrain.json").read_text())["stages"]
    subject = CardSubject("you/m", stages, config_of(tmp_path / "o"), "them/llava")
    assert subject.cache_bytes[0] == 4 * subject.cache_bytes[1]
    card = str(build_card(subject, Licence("mit", "a test"), None, ({}, "")))
    assert "AutoModelForImageTextToText.from_pretrained" in card and "AutoProcessor.from_pretrained" in card
    assert "image-text-to-text" in card and "vllm serve" not in card
    assert "vLLM has not been tried" in card and "reads an encoder" not in card
    # The section says its rotation in transformers 5's words alone.
    assert "It needs transformers 5" in card


@pytest.mark.slow
def test_a_wrapper_on_the_hub_is_looked_at_by_its_headers(
    tmp_path: Path, uptrain_against: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    source = save_wrapper(tmp_path / "s", "llava")
    with serve(source, "org/tiny") as (endpoint, _):
        looked = uptrain_against(endpoint, "inspect", "org/tiny", "--json")
        planned = uptrain_against(endpoint, "convert", "org/tiny", "--groups", "2", "--dry-run", "--json")
    assert looked.returncode == 0 == planned.returncode, looked.stderr + planned.stderr
    found = json.loads(looked.stdout)
    assert (found["model_type"], found["wrapped_in"], found["num_key_value_heads"]) == ("llama", "llava", 8)
    assert json.loads(planned.stdout)["host"] == "llava"


def test_the_report_counts_the_language_model_s_heads(tmp_path: Path) -> None:
    convert(str(save_wrapper(tmp_path / "s", "llava")), tmp_path / "o", Request("gqa", 2))
    (subject,) = models_in([tmp_path / "o"])
    assert [layer.num_key_value_heads for layer in subject.layers] == [2, 2]


def test_no_run_goes_on_where_another_part_s_config_was_changed(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "s", "llava")
    before = plan_conversion(str(source), Request("gqa", 2))[2].digest
    edit(source, vision_feature_layer=-1)
    assert plan_conversion(str(source), Request("gqa", 2))[2].digest != before


def test_similar_heads_move_in_the_language_model_alone(tmp_path: Path) -> None:
    """Heads that are equal but lie apart are found, and pooled without loss."""
    model = pool_language_model(tiny_wrapper("llava"), 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.weight.copy_(linear.weight.view(8, 8, 64)[order].view(64, 64))
            attention.o_proj.weight.copy_(attention.o_proj.weight.view(64, 8, 8)[:, order].reshape(64, 64))
    model.save_pretrained(tmp_path / "s")
    convert(str(tmp_path / "s"), tmp_path / "o", Request("gqa", 4, grouping="similar"))
    assert away(load(tmp_path / "o"), model, **picture_of(model)) <= NEAR


def test_a_checkpoint_s_family_has_the_names_of_the_wrapper(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_wrapper(tmp_path / "s", "idefics3"))
    described = describe_checkpoint(checkpoint, "m")
    assert described.family.class_name == "Idefics3ForConditionalGeneration" and not described.family.targets
    assert described.config["model_type"] == "llama" and checkpoint.config["model_type"] == "idefics3"
    assert described.wrapped_in == "idefics3"
    with pytest.raises(UsageError, match="idefics3"):
        check_heads(open_config(resolve(str(tmp_path / "s"))))
