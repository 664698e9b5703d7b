"""The embedding and the head of a result are those that transformers makes of the source, however they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from tests.conftest import tiny_config, tiny_model
from tests.corpus import checkpoint, corpus
from tests.oracle import pool_model
from uptrain.architectures.decoders import FAMILIES
from uptrain.checkpoint.reader import read_config
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import CheckpointError
from uptrain.models.auto_class import auto_class_of
from uptrain.models.register import register
from uptrain.training.recipe import Recipe
from uptrain.training.run import train

Save = Callable[..., Path]
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
# What config.json says, and of which values the head and the embedding are stored.
STORED = [
    (declared, head, table)
    for declared in (True, False, None)
    for head in ("absent", "equal", "different")
    for table in ("stored", "absent")
    if (head, table) != ("absent", "absent")
]

FEW = [
    (True, "different", "stored"),
    (True, "different", "absent"),
    (None, "absent", "stored"),
    (False, "equal", "stored"),
]


def load(folder: Path) -> Any:
    register()
    return auto_class_of(read_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    also = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model(input_ids=TOKENS, use_cache=False, **also).logits
    return found


def names_of(folder: Path) -> tuple[str, str]:
    """Return what transformers' class calls the embedding and the head in a checkpoint."""
    model = load(folder)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    return f"{table}.weight", f"{head}.weight"


def store(folder: Path, declared: bool | None, head: str, table: str) -> Path:
    """Rewrite a checkpoint so that its head and embedding are declared and stored in this way."""
    names = names_of(folder)
    model = load(folder)
    state = load_file(folder / "model.safetensors")
    values = model.get_input_embeddings().weight.detach().clone()
    for name in (*names, names[1].replace("lm_head", "embed_out")):
        state.pop(name, None)
    if table == "stored":
        state[names[0]] = values
    if head == "equal":
        state[names[1]] = values.clone()
    if head == "different":
        state[names[1]] = torch.randn(values.shape, generator=torch.Generator().manual_seed(3)) / 4
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config |= {} if declared is None else {"tie_word_embeddings": declared}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def complete(model_type: str, declared: bool | None, head: str, table: str) -> bool:
    """Tell whether a checkpoint stored like this has all that its class needs."""
    config = AutoConfig.for_model(model_type, **({} if declared is None else {"tie_word_embeddings": declared}))
    return config.tie_word_embeddings or (head != "absent" and table == "stored")


def assert_same(found: PreTrainedModel, wanted: PreTrainedModel) -> None:
    torch.testing.assert_close(logits(found), logits(wanted), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_and_defaults_are_the_class_s_own(model_type: str) -> None:
    register()
    entry = FAMILIES[model_type]
    words, config = entry.vocabulary, AutoConfig.for_model(model_type)
    ties = getattr(transformers, entry.auto_class)._model_mapping[type(config)]._tied_weights_keys
    assert ties[words.heads[0]] in {f"{prefix}{words.table}" for prefix in entry.prefixes}
    assert config.tie_word_embeddings == words.tied
    assert AutoConfig.for_model(model_type, tie_word_embeddings=False).tie_word_embeddings == words.always


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not name.startswith("uptrain_")])
def test_the_flag_decides_about_more_than_the_head_where_the_table_says_so(model_type: str) -> None:
    config = tiny_config(model_type)
    config.tie_word_embeddings = True
    tied = tiny_model(config).get_expanded_tied_weights_keys(all_submodels=True)
    words = FAMILIES[model_type].vocabulary
    assert words.more == (words.always or len(tied) > 1)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj", "gpt_neox", "opt", "t5"])
def test_sharing_heads_leaves_embedding_and_head_as_the_class_loads_them(
    model_type: str, save_tiny: Save, tmp_path: Path
) -> None:
    kinds = STORED if model_type == "llama" else FEW
    for number, kind in enumerate(kind for kind in kinds if complete(model_type, *kind)):
        source = store(save_tiny(model_type, name=f"src{number}"), *kind)
        for groups in (2, 1) if model_type == "gpt2" else (2,):
            out = tmp_path / f"out{number}-{groups}"
            convert(str(source), out, Request("gqa" if groups == 2 else "mqa", groups))
            oracle = pool_model(load(source), groups)
            assert_same(load(out), oracle)
            tied = oracle.get_input_embeddings().weight is oracle.get_output_embeddings().weight
            assert inspect(str(source)).tied_embeddings == tied


LATENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Under another ε the embedding is scaled, and the head is not.
    "deepseek_v3": (
        "llama", {"attention_bias": False, "rms_norm_eps": 1e-5},
        {"rope": "longrope", "kv_lora_rank": 48, "qk_rope_head_dim": 48},
    ),
    "uptrain_llama_mla": ("qwen2", {}, {"rope": "re-rotate", "kv_lora_rank": 49}),
    "uptrain_gpt2_mla": ("gpt2", {}, {"kv_lora_rank": 49}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", LATENTS)
def test_latents_have_the_source_s_embedding_and_head(target: str, save_tiny: Save, tmp_path: Path) -> None:
    model_type, changes, request = LATENTS[target]
    for number, kind in enumerate(kind for kind in STORED if complete(model_type, *kind)):
        source = store(
            save_tiny(model_type, 4 if model_type != "gpt2" else None, name=f"src{number}", **changes), *kind
        )
        done = convert(str(source), tmp_path / f"out{number}", Request("mla", **request))
        assert done.plan.target.name == target
        assert_same(load(tmp_path / f"out{number}"), load(source))


@pytest.mark.parametrize("head", ["equal", "different"])
def test_a_result_says_tied_only_where_its_head_is_the_embedding(head: str, save_tiny: Save, tmp_path: Path) -> None:
    """transformers 4, vLLM and llama.cpp believe the config and never look at a head beside a tied embedding."""
    source = store(save_tiny("llama"), True, head, "stored")
    convert(str(source), tmp_path / "out", Request("gqa", 2))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (head == "equal")
    assert inspect(str(source)).tied_embeddings == (head == "equal")


def test_a_head_that_differs_in_its_last_value_is_a_head_of_its_own(save_tiny: Save) -> None:
    """Wider than what is compared at a time, so that the last piece counts too."""
    source = store(save_tiny("llama", vocab_size=30_000), True, "equal", "stored")
    assert inspect(str(source)).tied_embeddings
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"][-1, -1] += 1
    save_file(state, source / "model.safetensors", {"format": "pt"})
    assert not inspect(str(source)).tied_embeddings


def test_pickled_weights_are_compared_too(save_tiny: Save) -> None:
    source = store(save_tiny("llama"), True, "different", "stored")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert not inspect(str(source), allow_pickle=True).tied_embeddings


def test_a_flag_of_another_kind_is_refused(save_tiny: Save) -> None:
    source = save_tiny("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": "false"}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        inspect(str(source))


def test_a_model_whose_embedding_is_stored_as_its_head_calibrates(tmp_path: Path) -> None:
    source = store(checkpoint(tmp_path / "src", "llama", attention_bias=False), True, "equal", "absent")
    whole = store(checkpoint(tmp_path / "whole", "llama", attention_bias=False), True, "absent", "stored")
    text = corpus(tmp_path / "text.txt", 60)
    for folder in (source, whole):
        request = Request("gqa", 2, method="calibrated", calibrate=str(text), calibration_tokens=256, repair_steps=0)
        convert(str(folder), folder.with_suffix(".out"), request)
    found, wanted = (load_file(folder.with_suffix(".out") / "model.safetensors") for folder in (source, whole))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("llama", (True, "different", "stored")),
        ("llama", (True, "equal", "stored")),
        ("llama", (True, "equal", "absent")),
        ("gpt2", (None, "different", "stored")),
        # T5 1.1: its own head, and a flag that only says that the decoder's output isn't scaled.
        ("t5", (False, "different", "stored")),
    ],
)
def test_training_reads_trains_and_writes_the_same_two(
    model_type: str, kind: tuple[bool | None, str, str], tmp_path: Path
) -> None:
    """With attention alone in training, head and embedding must come out as they are loaded from the source."""
    source = store(checkpoint(tmp_path / "src", model_type, **WITHOUT_DROPOUT.get(model_type, {})), *kind)
    for train_what in ("attention", "all"):
        train(Recipe.model_validate({
            "model": str(source), "output": str(tmp_path / train_what), "block_size": 16, "batch_size": 4, "steps": 2,
            "data": [{"files": str(corpus(tmp_path / "text.txt"))}], "learning_rate": 1e-2, "train": train_what,
            "precision": "fp32", "distill": None,
        }))  # fmt: skip
    before, frozen, trained = (load(tmp_path / name) for name in ("src", "attention", "all"))
    tied = before.get_input_embeddings().weight is before.get_output_embeddings().weight
    for after in (frozen, trained):
        assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == tied
    assert torch.equal(frozen.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert torch.equal(frozen.get_output_embeddings().weight, before.get_output_embeddings().weight)
    assert not torch.equal(trained.get_output_embeddings().weight, before.get_output_embeddings().weight)
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    assert config.get("tie_word_embeddings") == (False if not tied else kind[0])


WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {"t5": {"decoder_start_token_id": 0}}
