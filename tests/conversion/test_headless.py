"""Models without a language-model head keep their class and their head, and nobody measures or trains a random one.

The oracle is the source's own class of transformers, its heads pooled in place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

import uptrain
from tests.conftest import tiny_config
from tests.conversion.test_families import TOKENS
from tests.corpus import checkpoint, corpus
from tests.oracle import pool_model
from tests.publishing.test_hub_card import text_of
from uptrain.architectures.model_class import stem
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.reader import read_config
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.models.mla_targets import MLA_TARGET_CLASSES
from uptrain.models.register import own_class, register
from uptrain.models.targets import TARGET_CLASSES
from uptrain.training.recipes import load_recipe
from uptrain.training.run import train
from uptrain.workflows import SweepSettings, sweep

EXACT = Request("mla", rope="longrope", kv_lora_rank=48, qk_rope_head_dim=48)
SEQUENTIAL = {"use_parallel_residual": False}


def class_of(name: str) -> Any:
    register()
    return own_class(name) or getattr(transformers, name)


def save(folder: Path, model_type: str, class_name: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = tiny_config(model_type, **{"num_labels": 3, "pad_token_id": 0, **changes})
    model = class_of(class_name)(config).float()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.2 + (value.dim() == 1))
    model.save_pretrained(folder)
    return folder


def whole(folder: Path, class_name: str) -> PreTrainedModel:
    """Load a folder in a class that finds every tensor it has, and no other."""
    model, info = class_of(class_name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def outputs(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS)[0]


@pytest.mark.parametrize(
    ("model_type", "source", "request_", "result", "changes"),
    [
        ("llama", "LlamaForTokenClassification", Request("gqa", 2), "LlamaForTokenClassification", {}),
        ("qwen2", "Qwen2Model", Request("mqa"), "Qwen2Model", {}),
        ("gemma", "GemmaForSequenceClassification", Request("gqa", 2), "GemmaForSequenceClassification", {}),
        ("gpt2", "GPT2Model", Request("gqa", 2), "UptrainGPT2Model", {}),
        ("gpt2", "GPT2ForTokenClassification", Request("mqa"), "GPTBigCodeForTokenClassification", {}),
        ("gpt_neox", "GPTNeoXForSequenceClassification", Request("gqa", 2), "PhiForSequenceClassification", {}),
        ("gpt_neox", "GPTNeoXModel", Request("mqa"), "NemotronModel", SEQUENTIAL),
        ("gptj", "GPTJForSequenceClassification", Request("mqa"), "PhiForSequenceClassification", {}),
        ("t5", "T5Model", Request("gqa", 2), "UptrainT5Model", {}),
        ("llama", "LlamaForSequenceClassification", EXACT, "DeepseekV3ForSequenceClassification",
         {"attention_bias": False}),
        ("llama", "LlamaModel", EXACT, "DeepseekV3Model", {"attention_bias": False, "tie_word_embeddings": True}),
        ("llama", "LlamaModel", Request("mla", rope="re-rotate", kv_lora_rank=96), "UptrainLlamaMLAModel", {}),
    ],
)  # fmt: skip
def test_the_class_and_what_it_computes_stay(
    model_type: str, source: str, request_: Request, result: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "src", model_type, source, **changes)
    done = convert(str(folder), tmp_path / "out", request_)
    assert read_config(done.out)["architectures"] == [result]
    original, groups = whole(folder, source), done.plan.after[0].num_key_value_heads
    expected = original if request_.target == "mla" else pool_model(original, groups)
    if model_type == "t5":
        both = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
        with torch.no_grad():
            found, wanted = whole(done.out, result)(**both)[0], expected(**both)[0]
    else:
        found, wanted = outputs(whole(done.out, result)), outputs(expected)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("model_type", "source", "request_"),
    [
        ("gpt2", "GPT2ForSequenceClassification", Request("gqa", 2)),
        ("gpt_neox", "GPTNeoXForTokenClassification", Request("gqa", 2)),
        ("llama", "LlamaForSequenceClassification", Request("mla", rope="re-rotate", kv_lora_rank=20)),
    ],
)
def test_a_target_without_a_class_for_the_purpose_is_refused(
    model_type: str, source: str, request_: Request, tmp_path: Path
) -> None:
    folder = save(tmp_path / "src", model_type, source)
    with pytest.raises(UsageError, match=source):
        plan_conversion(str(folder), request_)


def test_every_purpose_that_a_target_claims_is_a_class() -> None:
    for target in (*TARGET_CLASSES.values(), *(entry.target for entry in MLA_TARGET_CLASSES.values())):
        for purpose in target.purposes:
            assert class_of(stem(target.family.class_name) + purpose)


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    """Return a reward model whose config ties embeddings, so that the Auto class would load it without complaint."""
    folder = checkpoint(tmp_path / "words", "llama")
    config = {"num_labels": 1, "tie_word_embeddings": True, "vocab_size": read_config(folder)["vocab_size"]}
    save(tmp_path / "reward", "llama", "LlamaForSequenceClassification", **config)
    for path in folder.glob("token*"):
        (tmp_path / "reward" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "reward"


def test_no_head_is_measured_or_trained_or_loaded_that_is_not_there(reward: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "up", corpus(tmp_path / "text.txt")
    overrides = [f"model={reward}", f"output={out}", f"data=[{text}]", "tokens=128", "block_size=32", "distill=null"]
    for ask in (
        lambda: evaluate(str(reward), EvaluationSettings(repeats=0)),
        lambda: evaluate(str(tmp_path / "words"), EvaluationSettings(repeats=0), baseline=str(reward)),
        lambda: train(load_recipe("gqa-uptrain", overrides)),
        lambda: uptrain.load(reward),
        lambda: sweep(str(reward), ["mqa"], SweepSettings(methods=["mean"]), out=out),
    ):
        with pytest.raises(UsageError, match="LlamaForSequenceClassification"):
            ask()
    assert {path.name for path in tmp_path.iterdir()} <= {"reward", "words", "text.txt"}


def test_a_card_loads_the_head_that_is_there(reward: Path, tmp_path: Path) -> None:
    card = text_of(convert(str(reward), tmp_path / "out", Request("gqa", 2)).out)
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "pipeline_tag: text-classification" in card
    assert "generate(" not in card


def test_a_class_that_transformers_does_not_have_keeps_its_name_and_its_head(reward: Path, tmp_path: Path) -> None:
    """Of reward models with a class of their own, the body is asked for, and the rest is named."""
    config = read_config(reward)
    (reward / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForRewardModel"]}))
    notes: list[str] = []
    convert(str(reward), tmp_path / "out", Request("mqa"), events=Events(note=notes.append))
    assert read_config(tmp_path / "out")["architectures"] == ["LlamaForRewardModel"]
    assert "score.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert [note for note in notes if "LlamaForRewardModel" in note]
    assert [note for note in notes if "score.weight" in note]
