"""A recipe is a file that somebody sends: plain values only, refused in a sentence, and nothing in it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.attempt import attempt, inputs
from tests.fuzz.hostile import damaged, values
from uptrain.training import recipes
from uptrain.training.recipe import Recipe

BASE = {
    "model": "m", "output": "o", "steps": 3, "batch_size": 4, "warmup": 0.1, "distill": {"teacher": "t", "top_k": 3},
    "data": ["a.txt", {"files": ["b.jsonl"], "chat_field": "messages"}], "held_out": [{"builtin": "python-stdlib"}],
    "lora": {"r": 4, "target_modules": ["q_proj"]}, "betas": [0.9, 0.95],
}  # fmt: skip
KEYS = (*Recipe.model_fields, "dataset", "prompts", "weight", "source", "split")
PIECES = st.sampled_from([
    "!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "!!python/module:ran", "!evil",
    "&a ", "*a", "2001-99-99", "12:99:99", "1e999", "0x", "0o9", "._", "!!binary x", "!!int x", "!!float y",
    "!!bool z", "!!timestamp q", "<<: ", "? ", "- ", ": ", "{", "}", "[", "]", "|", ">", "\n", "  ", "model", "data",
    "steps: 3", "'", '"', "#", "%", "---", "=", "1" * 5000, "[" * 400, "~", "null", ".inf", ".nan", "\x00",
    "\ufeff", "é", "\U0001f600",
])  # fmt: skip


@pytest.mark.slow
@given(text=st.lists(PIECES | st.text(max_size=5), max_size=8).map("".join))
@inputs(150)
@example(text="when: 2001-99-99")  # was a ValueError
@example(text="steps: " + "1" * 5000)
@example(text="a: " + "[" * 2000)
@example(text="a: !!timestamp q")
@example(text="&a [*a]")
@example(text="a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]")
@example(text="model: !!python/object/apply:os.system ['touch ran']")
def test_yaml_is_plain_values_or_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    attempt(recipes.load_recipe, str(path))
    attempt(recipes.load_recipe, "demo-uptrain", [f"model={text}"])
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml"}


@pytest.mark.slow
@given(changed=damaged(BASE, KEYS), where=st.sampled_from(KEYS), value=values)
@inputs(200)
@example(changed=BASE, where="data", value=["x" * 5000])
def test_values_of_any_kind_fit_or_are_refused(changed: dict[str, Any], where: str, value: Any, tmp_path: Path) -> None:
    """What is taken for a recipe can be asked for its length and written down again."""
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(changed, allow_unicode=True)
    path.write_text(text, encoding="utf-8", errors="replace")
    for overrides in ((), (f"{where}={yaml.safe_dump(value).strip()}",), (f"distill.{where}=1", str(where))):
        recipe, _ = attempt(recipes.load_recipe, str(path), overrides)
        if recipe is not None:
            assert recipe.total_steps > 0 and recipe.warmup_steps >= 0
            assert recipes.parse_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", ["~nobody-here/x.yaml", "a\0b", "x" * 5000, "", ".", "/", "\ud800"])
def test_names_of_any_kind(name: str) -> None:
    assert attempt(recipes.load_recipe, name)[1]


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(2**40)
    assert "larger than 256 KiB" in attempt(recipes.load_recipe, str(tmp_path / "huge.yaml"))[1]
