"""What a class needs is asked of the class: no checkpoint converts or loads of which a weight would be random.

The oracle is transformers' own report of what it misses while it loads the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uptrain
from tests.conftest import auto_class, tiny_config, tiny_model
from tests.corpus import checkpoint, corpus
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import CheckpointDescription
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint, read_config
from uptrain.checkpoint.source import resolve
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.class_checks import rotation, weights
from uptrain.conversion.class_checks.names import check_kin
from uptrain.conversion.plan import heads
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UptrainError
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.models import class_keys
from uptrain.models.class_fit import Fit
from uptrain.models.loading import load_model
from uptrain.models.opened import open_model
from uptrain.training.export import assemble, gather
from uptrain.training.recipes import load_recipe
from uptrain.training.run import train

Save = Callable[..., Path]
SINGLE = "model.safetensors"
OLD_BUFFERS = {
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq", (6,)),
    "gpt2": ("transformer.h.0.attn.bias", (1, 1, 64, 64)),
    "gpt_neox": ("gpt_neox.layers.1.attention.masked_bias", ()),
}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **config}))
    return folder


def fits(folder: Path, model_type: str) -> bool:
    """Ask transformers whether it loads the folder with every weight from its file."""
    try:
        _, info = auto_class(model_type).from_pretrained(folder, output_loading_info=True)
    except RuntimeError:
        return False
    return not info["missing_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("model_type", ["llama", "gemma", "t5", "mixtral"])
def test_convert_refuses_just_what_transformers_would_fill(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    """Each tensor outside the first layer is left out once."""
    source = save_tiny(model_type)
    tensors = load_file(source / SINGLE)
    refused = 0
    for name in [name for name in tensors if ".0." not in name]:
        rewrite(source, {key: value for key, value in tensors.items() if key != name})
        if fits(source, model_type):
            convert(str(source), tmp_path / "out", Request("mqa"), overwrite=True)
            continue
        with pytest.raises(CheckpointError) as error:
            plan_conversion(str(source), Request("mqa"))
        # The class names what it makes of a tensor, which for experts is another.
        assert name.split(".")[-2] in str(error.value) or "experts" in str(error.value), name
        refused += 1
    assert refused > 5


def test_a_result_keeps_what_a_whole_source_has_without_a_note(save_tiny: Save) -> None:
    _, _, planned = plan_conversion(str(save_tiny("llama")), Request("gqa", 2))
    assert planned.notes == ()


@pytest.mark.parametrize("model_type", OLD_BUFFERS)
def test_tables_that_older_classes_stored_are_no_weights(model_type: str, save_tiny: Save) -> None:
    source = save_tiny(model_type)
    name, shape = OLD_BUFFERS[model_type]
    rewrite(source, {**load_file(source / SINGLE), name: torch.ones(shape)})
    _, _, planned = plan_conversion(str(source), Request("mqa"))
    assert planned.notes == ()


@pytest.mark.parametrize("request_", [Request("gqa", 2), Request("mla", rope="re-rotate", kv_lora_rank=20)])
@pytest.mark.parametrize(
    "extra", ["model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias",
              "model.layers.0.self_attn.q_proj.lora_A.weight"]
)  # fmt: skip
def test_what_a_layer_holds_and_its_class_leaves_out_is_refused(extra: str, request_: Request, save_tiny: Save) -> None:
    source = save_tiny("llama", attention_bias=False)
    rewrite(source, {**load_file(source / SINGLE), extra: torch.ones(48)})
    with pytest.raises(CheckpointError, match=extra):
        plan_conversion(str(source), request_)
    with pytest.raises(CheckpointError, match=extra):
        uptrain.load(source)


def test_another_vocabulary_than_the_config_promises_is_named(save_tiny: Save) -> None:
    source = save_tiny("llama")
    rewrite(source, load_file(source / SINGLE), vocab_size=60)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight .*\[64, 48\].*\[60, 48\]"):
        plan_conversion(str(source), Request("mqa"))
    with pytest.raises(CheckpointError, match="vocab_size"):
        load_model(open_model(resolve(str(source))))


def test_a_tensor_beside_the_layers_goes_along_and_is_named(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    rewrite(source, {**load_file(source / SINGLE), "v_head.summary.weight": torch.ones(1, 48)})
    notes: list[str] = []
    convert(str(source), tmp_path / "out", Request("mqa"), events=Events(note=notes.append))
    assert "v_head.summary.weight" in load_file(tmp_path / "out" / SINGLE)
    assert [note for note in notes if "v_head.summary.weight" in note]


def test_nothing_is_written_where_a_weight_is_missing(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    tensors = load_file(source / SINGLE)
    del tensors["model.norm.weight"]
    rewrite(source, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        convert(str(source), tmp_path / "out", Request("mqa"))
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["transformer.ln_f.weight", "transformer.h.1.mlp.c_proj.bias"])
def test_eval_and_train_refuse_what_lacks_a_weight(missing: str, tmp_path: Path) -> None:
    whole, source = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "src")
    tensors = load_file(source / SINGLE)
    del tensors[missing]
    rewrite(source, tensors)
    text = corpus(tmp_path / "text.txt")
    for model, baseline in ((source, None), (whole, source)):
        with pytest.raises(CheckpointError, match=missing):
            evaluate(str(model), EvaluationSettings(repeats=0), baseline=None if baseline is None else str(baseline))
    base = [f"data=[{text}]", "tokens=128", "block_size=32", "batch_size=2"]
    for number, (model, teacher) in enumerate(((source, whole), (whole, source))):
        out = tmp_path / f"up{number}"
        recipe = load_recipe("gqa-uptrain", [f"model={model}", f"distill.teacher={teacher}", f"output={out}", *base])
        with pytest.raises(CheckpointError, match=missing):
            train(recipe)
        assert not out.exists()


def test_experts_that_do_not_go_together_are_named(save_tiny: Save) -> None:
    """transformers only points to a report that it logged, which uptrain keeps off the screen."""
    source = save_tiny("mixtral")
    tensors = load_file(source / SINGLE)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    rewrite(source, tensors)
    for ask in (
        lambda: plan_conversion(str(source), Request("mqa")),
        lambda: load_model(open_model(resolve(str(source)))),
    ):
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts") as error:
            ask()
        assert "above" not in str(error.value)


def test_a_result_whose_class_would_leave_a_weight_out_is_refused(
    save_tiny: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "result_class", lambda *_: "LlamaModel")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        plan_conversion(str(save_tiny("llama", tie_word_embeddings=False)), Request("mqa"))


def test_a_trained_model_is_not_written_without_all_its_weights() -> None:
    model = tiny_model(tiny_config("llama"))
    weights = gather(model, torch.float32)
    assert sorted(assemble(model, weights, torch.float32).state_dict()) == sorted(model.state_dict())
    for changed in ({key: value for key, value in weights.items() if "1.mlp.up" not in key},
                    {**weights, "model.layers.1.mlp.up_proj.scale": torch.ones(1)}):  # fmt: skip
        with pytest.raises(UptrainError, match=r"mlp\.up_proj"):
            assemble(model, changed, torch.float32)


def test_a_source_that_is_quantized_in_part_is_said_not_to_be_asked(save_tiny: Save) -> None:
    _, found, planned = plan_conversion(str(save_tiny("llama")), Request("mqa"))
    quantized = replace(found, config={**found.config, "quantization_config": {"quant_method": "unheard of"}})
    planned = replace(planned, source=replace(planned.source, checkpoint=quantized))
    (note,) = weights.check_classes(quantized, planned, "it")
    assert "quantized" in note


def question(folder: Path) -> weights.Question:
    found = open_checkpoint(folder)
    return weights.Question(found.config, {name: info.shape for name, info in found.tensors.items()})


@pytest.mark.slow
def test_a_child_process_answers_as_this_one_does(save_tiny: Save) -> None:
    whole = question(save_tiny("gemma2"))
    cut = weights.Question(whole.config, {**whole.shapes, "model.norm.weight": (7,)})
    cut.shapes.pop("model.layers.0.mlp.up_proj.weight")
    asked = (whole, cut)
    assert weights._asked_in_child(asked) == [class_keys.ask(each.config, each.shapes) for each in asked]


@pytest.mark.parametrize("said", [{"rope_parameters": {}}, {"rope_scaling": {"type": "linear", "factor": 2.0}}])
def test_a_config_stays_as_it_is_when_its_class_is_asked(
    said: dict[str, Any], save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPTRAIN_CACHE", str(tmp_path / "own"))  # where no earlier run left the answer
    source = save_tiny("gpt_neox", hidden_size=64)
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**config, **said}))
    before = question(source)
    text = before.text
    weights.answers([before])
    assert before.text == text
    assert convert(str(source), tmp_path / "out", Request("mqa")).out.is_dir()


def test_an_answer_is_stored_and_a_damaged_store_is_asked_again(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPTRAIN_CACHE", str(tmp_path / "own"))
    asked, real = [], class_keys.ask
    monkeypatch.setattr(class_keys, "ask", lambda *args: asked.append(1) or real(*args))
    one = question(save_tiny("llama"))
    wanted = weights.answers([one])
    assert weights.answers([one]) == wanted
    assert len(asked) == 1
    (stored,) = (tmp_path / "own" / "classes").glob("*.json")
    for damage in ("", "[]", '{"missing": 3}', "\0"):
        stored.write_text(damage)
        assert weights.answers([one]) == wanted
    assert len(asked) == 5
    other = weights.Question({**one.config, "vocab_size": 65}, one.shapes)
    assert weights.answers([other])[0].mismatched


def test_rotary_tables_are_stored_in_the_same_place_and_a_damaged_one_is_asked_again(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPTRAIN_CACHE", str(tmp_path / "own"))
    asked, real = [], rotation.answers
    monkeypatch.setattr(rotation, "answers", lambda configs: asked.append(1) or real(configs))
    configs = [open_checkpoint(save_tiny("llama")).config]
    wanted = real(configs)
    for _ in range(2):
        assert rotation._ask(configs, here=True) == wanted
    assert len(asked) == 1
    (stored,) = (tmp_path / "own" / "classes").glob("*.json")
    for damage in ("", "[]", "{}", '{"": {"short": 3}}', "\0"):
        stored.write_text(damage)
        assert rotation._ask(configs, here=True) == wanted
    unreadable = [{**configs[0], "rope_parameters": {"rope_type": "mine"}}, {"model_type": "nobody's"}]
    for _ in range(2):
        reason, unknown = rotation._ask(unreadable, here=True)
        assert "mine" in reason and unknown == {}


def test_a_cache_that_cannot_be_written_is_done_without(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("UPTRAIN_CACHE", str(tmp_path / "file"))
    assert weights.answers([question(save_tiny("llama"))])[0] == Fit("LlamaForCausalLM")


@pytest.fixture
def no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPTRAIN_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(weights, "find_spec", lambda name: None if name == "torch" else object())


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight"), ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"), ("llama", "lm_head.weight"),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias"), ("gpt2", "transformer.wte.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_torch")
def test_names_alone_show_what_is_missing_where_no_class_can_be_asked(
    model_type: str, missing: str, save_tiny: Save
) -> None:
    # With as many positions as tokens, a table of the one could be the other's.
    own = {"gpt2": {"n_positions": 32}, "llama": {"tie_word_embeddings": False}}
    source = save_tiny(model_type, **own.get(model_type, {}))
    assert [note for note in plan_conversion(str(source), Request("mqa"))[2].notes if "torch" in note]
    tensors = load_file(source / SINGLE)
    del tensors[missing]
    rewrite(source, tensors)
    with pytest.raises(CheckpointError, match=r"lacks .*, which its class would fill"):
        plan_conversion(str(source), Request("mqa"))


@pytest.mark.parametrize("model_type", sorted(key for key in FAMILIES if not key.startswith(("uptrain", "deep"))))
def test_names_alone_refuse_no_whole_checkpoint(model_type: str) -> None:
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = auto_class(model_type).from_config(config)
    tied = set(model.all_tied_weights_keys)
    tensors = {
        name: TensorInfo(name, "F32", tuple(value.shape), SINGLE, -1, -1)
        for name, value in model.state_dict().items()
        if name not in tied
    }
    values = json.loads(config.to_json_string(use_diff=False))
    checkpoint = Checkpoint(Path(), values, tensors)
    family = FAMILIES[model_type]
    check_kin(CheckpointDescription(family=family, config=values, name=model_type, checkpoint=checkpoint))
