"""Every recipe that comes with uptrain runs, on the model its comment says it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import corpus
from uptrain.checkpoint.manifest import read_manifest, verify
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UsageError
from uptrain.training import recipes, train

TARGETS = {
    "mqa-uptrain": Request("mqa", method="svd"),
    "mla-uptrain": Request("mla", kv_lora_rank=64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.shipped())
def test_two_steps_of_it_on_the_demo(name: str, tmp_path: Path) -> None:
    text = corpus(tmp_path / "text.txt", 150)
    overrides = [
        f"output={tmp_path / 'out'}", f"data=[{text}]", f"held_out=[{text}]", "held_out_tokens=256", "steps=2",
        "block_size=64", "batch_size=2", "eval_every=1", "log_every=1",
    ]  # fmt: skip
    if recipes.load_recipe(name).config is None:
        convert("demo", tmp_path / "converted", TARGETS.get(name, Request("gqa", 4)))
        overrides.append(f"model={tmp_path / 'converted'}")
    else:
        overrides.append("tokenizer.vocab_size=300")
    made = recipes.load_recipe(name, overrides)
    done = train(made)
    assert done is not None
    assert done.steps == 2
    assert (done.teacher == "demo") == (made.distill is not None)
    verify(done.out)
    stages = (read_manifest(done.out) or {})["stages"]
    assert stages[-1]["recipe"]["steps"] == 2


@pytest.mark.parametrize("name", ["gqa-uptrain", "mqa-uptrain", "mla-uptrain"])
def test_a_converted_model_learns_from_its_original(name: str) -> None:
    assert recipes.load_recipe(name).distill is not None


@pytest.mark.parametrize("name", [name for name in recipes.shipped() if recipes.load_recipe(name).model])
def test_its_own_model_is_a_folder_to_make_and_never_a_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("uptrain.training.setup.resolve", lambda *_: pytest.fail("asked for the model"))
    made = recipes.load_recipe(name)
    with pytest.raises(UsageError, match=f"{made.model}.*model=CHECKPOINT"):
        train(made)
    recipes.check_model(recipes.load_recipe(name, ["model=gpt2"]))
    (tmp_path / str(made.model)).mkdir()
    recipes.check_model(made)
