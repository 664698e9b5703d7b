"""Only what a recipe names trains, at the rate it names, and adapters end up in the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_config, tiny_model
from tests.corpus import NO_DROPOUT, checkpoint, corpus
from uptrain.errors import UsageError
from uptrain.training import recipes
from uptrain.training.optimizer import make_optimizer, make_schedule
from uptrain.training.run import train
from uptrain.training.scope import is_attention, select_trainable


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., recipes.Recipe]:
    """Return a function that makes a recipe on a tiny checkpoint."""
    corpus(tmp_path / "text.txt")

    def make(**changes: Any) -> recipes.Recipe:
        values: dict[str, Any] = {
            "model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "data": [str(tmp_path / "text.txt")],
            "block_size": 32, "batch_size": 4, "steps": 4, "learning_rate": 1e-2, "warmup": 0, "precision": "fp32",
        }  # fmt: skip
        return recipes.parse_recipe({**values, **changes})

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("family", "inside"), [("gpt2", "attn.c_"), ("llama", "self_attn.")])
def test_attention_alone_moves(family: str, inside: str, recipe: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", family, **(NO_DROPOUT if family == "gpt2" else {}))
    train(recipe(train="attention"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    for name, tensor in before.items():
        assert (inside in name) == (not torch.equal(tensor, after[name])), name


def test_attention_may_have_a_rate_of_its_own(recipe: Callable[..., recipes.Recipe]) -> None:
    model = tiny_model(tiny_config("llama"))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, recipe(attention_learning_rate=0.5))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (0.5 if "self_attn" in names[id(parameter)] else 1e-2)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_lora_trains_adapters_and_writes_a_plain_checkpoint(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path, precision: str, tolerance: float
) -> None:
    checkpoint(tmp_path / "model", "llama", attention_bias=False)
    made = recipe(
        lora={"r": 2, "alpha": 4}, held_out=[str(tmp_path / "text.txt")], held_out_tokens=640, precision=precision
    )
    done = train(made)
    assert done is not None
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        change = after[name] - tensor
        assert ("self_attn" in name) == bool(change.any())
        if change.any():
            assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 2
    # The merged weights predict what the adapted model did.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    from uptrain.data.token_text import read_tokens
    from uptrain.models.loading import load_tokenizer
    from uptrain.training.losses import lm_loss

    ids = torch.from_numpy(read_tokens(made.held_out, load_tokenizer(tmp_path / "out"), 640).ids).view(-1, 32)
    with torch.no_grad():
        assert abs(lm_loss(model, ids).item() - (done.held_out_loss or 0)) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("family", "apart"), [("bloom", False), ("llama", True)])
def test_a_class_that_ignores_positions_is_not_trusted_with_packed_documents(
    family: str, apart: bool, recipe: Callable[..., recipes.Recipe], tmp_path: Path
) -> None:
    checkpoint(tmp_path / "model", family, **({} if family == "bloom" else {"attention_bias": False}))
    done = train(recipe(steps=1))
    assert done is not None
    assert done.isolated == apart
    if not apart:
        with pytest.raises(UsageError, match="can't keep documents"):
            train(recipe(steps=1, isolate_documents=True, overwrite=True))


def test_lora_on_modules_that_are_not_there_is_one_sentence(recipe: Callable[..., recipes.Recipe]) -> None:
    with pytest.raises(UsageError, match="target_modules"):
        select_trainable(tiny_model(tiny_config("llama")), recipe(lora={"target_modules": ["w_pack"]}))


def test_an_unknown_family_has_no_known_attention() -> None:
    with pytest.raises(UsageError, match="of a mamba model are not known"):
        is_attention("mamba", "x")


@pytest.mark.parametrize("schedule", ["cosine", "1-sqrt", "linear", "wsd", "constant"])
def test_schedules_warm_up_and_come_down_as_named(schedule: str, recipe: Callable[..., recipes.Recipe]) -> None:
    made = recipe(schedule=schedule, steps=40, warmup=10, decay=0.25, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    following = make_schedule(optimizer, made)
    rates = []
    for _ in range(40):
        rates.append(following.get_last_lr()[0])
        optimizer.step()
        following.step()
    assert rates[:11] == sorted(rates[:11])
    assert rates[0] <= 0.1
    assert rates[10] == pytest.approx(1.0)
    end = following.get_last_lr()[0]
    assert end == pytest.approx(1.0 if schedule == "constant" else 0.1)
    if schedule == "1-sqrt":
        assert rates[25] == pytest.approx(1 - 0.9 * (15 / 30) ** 0.5)
    if schedule == "wsd":
        assert rates[10:31] == pytest.approx([1.0] * 21)
        assert rates[35] == pytest.approx(1 - 0.9 * 0.5**0.5)
