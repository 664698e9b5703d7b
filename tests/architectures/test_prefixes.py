"""Names under a wrapper's prefix are recognised as such in every command, and what mends them is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import uptrain
from tests.conftest import tiny_config, tiny_model
from tests.corpus import checkpoint, corpus
from uptrain.conversion import plan_conversion
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.data.sources import parse_source
from uptrain.errors import CheckpointError
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.training.recipe import Recipe
from uptrain.training.run import train

Save = Callable[..., Path]


def renamed(folder: Path, rename: Callable[[str], str], **others: torch.Tensor) -> Path:
    state = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**state, **others}, folder / "model.safetensors", {"format": "pt"})
    return folder


def wrapped_layers(name: str) -> str:
    """As torch.compile names the tensors of single layers."""
    return re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name)


PREFIXES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "compiled": ("llama", lambda name: f"_orig_mod.{name}", "_orig_mod."),
    "data parallel": ("gpt2", lambda name: f"module.{name}", "module."),
    "both": ("llama", lambda name: f"module._orig_mod.{name}", "module._orig_mod."),
    "compiled layers": ("llama", wrapped_layers, "_orig_mod."),
    "compiled layers, parallel": ("llama", lambda name: f"module.{wrapped_layers(name)}", "module. and _orig_mod."),
    "a tower cut out": ("qwen2", lambda name: f"language_model.{name}", "language_model."),
    "a tower inside the body": (
        "llama", lambda name: name.replace("model.", "model.language_model.", 1), "model.language_model.",
    ),
    "another tower's name": ("opt", lambda name: f"text_model.{name}", "text_model."),
}  # fmt: skip


@pytest.mark.parametrize("case", PREFIXES)
def test_the_prefix_is_named_and_the_line_that_removes_it_works(case: str, save_tiny: Save, tmp_path: Path) -> None:
    model_type, rename, prefix = PREFIXES[case]
    whole, source = save_tiny(model_type, name="whole"), save_tiny(model_type, name="source")
    picture = {"vision_tower.layers.0.self_attn.o_proj.weight": torch.ones(2, 2)} if "tower" in case else {}
    renamed(source, rename, **picture)
    for refused in (lambda: inspect(str(source)), lambda: plan_conversion(str(source), Request("mqa"))):
        with pytest.raises(CheckpointError, match=re.escape(prefix)) as caught:
            refused()
    line = re.search(r"transformers\.\S+\(.*\)\.save_pretrained\('NEW'.*\)", caught.value.hint)
    assert line is not None
    eval(line[0].replace("'NEW'", repr(str(tmp_path / "mended"))), {"transformers": transformers})
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "mended", whole))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_what_torch_itself_writes_is_recognised(tmp_path: Path) -> None:
    """The names that the wrappers of this torch give, not those that we think they give."""
    model = tiny_model(tiny_config("gpt2"))
    model.save_pretrained(tmp_path)
    for wrap, tool in ((partial(torch.compile, backend="eager"), "torch.compile"), (nn.DataParallel, "DataParallel")):
        state = {name: tensor.clone() for name, tensor in wrap(model).state_dict().items() if "lm_head" not in name}
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=tool):
            inspect(str(tmp_path))


def test_no_command_takes_a_prefixed_model_for_random_weights(tmp_path: Path) -> None:
    source = renamed(checkpoint(tmp_path / "source"), lambda name: f"_orig_mod.{name}")
    text = corpus(tmp_path / "text.txt")
    recipe = Recipe.model_validate({
        "model": str(source), "output": str(tmp_path / "out"), "data": [{"files": str(text)}], "block_size": 16,
        "steps": 1, "distill": None,
    })  # fmt: skip
    commands: tuple[Callable[[], object], ...] = (
        lambda: train(recipe),
        lambda: evaluate(str(source), EvaluationSettings(text=[parse_source(str(text))], context=16, repeats=0)),
        lambda: uptrain.load(source),
    )
    for command in commands:
        with pytest.raises(CheckpointError, match=r"torch\.compile"):
            command()
    assert isinstance(uptrain.load(source, key_mapping={r"^_orig_mod\.": ""}), GPT2LMHeadModel)


def test_names_of_another_family_are_no_prefix(save_tiny: Save) -> None:
    source = renamed(save_tiny("llama"), lambda name: name.replace("self_attn", "attention"))
    with pytest.raises(CheckpointError, match="has no tensor model"):
        inspect(str(source))
    # It is the vision tower of something, whatever its names end in.
    source = renamed(save_tiny("qwen2", name="tower"), lambda name: f"vision_tower.{name}")
    with pytest.raises(CheckpointError, match="has no tensor model"):
        inspect(str(source))


def test_a_body_saved_alone_is_no_wrapper(save_tiny: Save) -> None:
    source = renamed(save_tiny("gpt2"), lambda name: name.removeprefix("transformer."))
    assert inspect(str(source)).num_attention_heads == 4
    assert AutoModelForCausalLM.from_pretrained(source) is not None
