"""A recipe means the same wherever it is read, and a slip in it is one sentence that says what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uptrain.data.sources import Builtin, Dataset, Files, TeacherText, parse_source
from uptrain.errors import UsageError
from uptrain.training import recipes

BASE = {"model": "m", "output": "o", "data": ["a.txt"], "steps": 3}


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_shipped_recipe_loads_says_what_it_is_for_and_names_its_command(name: str) -> None:
    path = recipes.shipped()[name]
    assert recipes.load_recipe(name).total_steps > 0
    assert recipes.summary(path).endswith((".", ":", ")."))
    assert f"uptrain train recipes/{name}.yaml" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("written", ["demo-uptrain", "demo-uptrain.yaml", "recipes/demo-uptrain.yaml"])
def test_shipped_recipe_is_found_from_any_folder(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.load_recipe(written) == recipes.load_recipe("demo-uptrain")


def test_a_file_of_ones_own_comes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/demo-uptrain.yaml").write_text("{model: mine, output: o, data: [a.txt], steps: 1}")
    assert recipes.load_recipe("recipes/demo-uptrain.yaml").model == "mine"


def test_overrides_are_yaml_and_reach_into_sections() -> None:
    recipe = recipes.load_recipe(
        "demo-pretrain", ["learning_rate=1e-3", "tokens=5_000", "tokenizer.vocab_size=300", "config.n_layer=2",
                          "data=[a.txt, b/*.jsonl]"]
    )  # fmt: skip
    assert recipe.learning_rate == 1e-3
    assert recipe.tokens == 5000
    assert isinstance(recipe.tokenizer, recipes.TokenizerSpec)
    assert recipe.tokenizer.vocab_size == 300
    assert recipe.config is not None
    assert recipe.config["n_layer"] == 2
    assert recipe.config["n_embd"] == 256
    assert recipe.data == [Files(files="a.txt"), Files(files="b/*.jsonl")]


def test_an_override_of_steps_replaces_the_recipes_tokens() -> None:
    assert recipes.load_recipe("demo-uptrain", ["steps=7"]).total_steps == 7


def test_a_source_written_as_a_word_is_what_it_looks_like(tmp_path: Path) -> None:
    odd = tmp_path / "notes"
    odd.write_text("x")
    assert parse_source("python-stdlib:held-out") == Builtin(builtin="python-stdlib", split="held-out")
    assert parse_source("corpus/*") == Files(files="corpus/*")
    assert parse_source("corpus.parquet") == Files(files="corpus.parquet")
    assert parse_source(str(odd)) == Files(files=str(odd))
    assert parse_source("org/name") == Dataset(dataset="org/name")
    assert parse_source({"dataset": "org/name", "stream": True}) == Dataset(dataset="org/name", stream=True)


@given(tokens=st.integers(1, 10**12), batch=st.integers(1, 512), block=st.integers(2, 8192))
def test_the_run_is_the_fewest_steps_that_see_the_tokens_asked_for(tokens: int, batch: int, block: int) -> None:
    recipe = recipes.parse_recipe({**BASE, "steps": None, "tokens": tokens, "batch_size": batch, "block_size": block})
    assert (recipe.total_steps - 1) * batch * block < tokens <= recipe.total_steps * batch * block


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.25, 25), (0.003, 1), (30, 30), (1000, 100)])
def test_warmup_is_a_share_below_one_and_steps_from_there(warmup: float, steps: int) -> None:
    assert recipes.parse_recipe({**BASE, "steps": 100, "warmup": warmup}).warmup_steps == steps


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_what_provenance_records_is_the_recipe(name: str) -> None:
    recipe = recipes.load_recipe(name)
    assert recipes.parse_recipe(recipe.to_dict()) == recipe


def test_what_provenance_records_of_every_kind_of_source_is_the_source() -> None:
    data = [
        {"files": ["a.parquet", "b.jsonl"], "chat_field": "messages", "weight": 1},
        {"dataset": "org/name", "name": "en", "stream": True, "text_field": "body", "weight": 0.5},
        {"source": "teacher", "tokens": 100, "temperature": 0.7, "prompts": "a/*.txt", "weight": 2},
        {"source": "teacher", "tokens": 100, "weight": 2},
        {"builtin": "python-stdlib", "weight": 3},
    ]
    recipe = recipes.parse_recipe({**BASE, "data": data})
    assert recipes.parse_recipe(recipe.to_dict()) == recipe
    assert isinstance(recipe.data[2], TeacherText)
    assert recipe.data[2].prompts == Files(files="a/*.txt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lerning_rate": 1}, "'learning_rate'"),
        ({"data": [{"files": "a", "textfield": "b"}]}, "data.0.textfield"),
        ({"data": [{"file": "a"}]}, "file name"),
        ({"data": []}, "data"),
        ({"steps": None}, "tokens, steps and alpha"),
        ({"tokens": 5}, "tokens, steps and alpha"),
        ({"config": {"model_type": "gpt2"}}, "model"),
        ({"model": None, "config": {"model_type": "gpt2"}}, "tokenizer"),
        ({"tokenizer": {"vocab_size": 300}}, "tokenizer"),
        ({"batch_size": 6, "gradient_accumulation": 4}, "batch_size 6"),
        ({"data": ["a.txt", {"dataset": "x", "stream": True}]}, "source"),
        ({"data": ["a.txt", {"files": "b.txt", "weight": 1}]}, "weight"),
        ({"data": [{"files": "b.txt", "weight": 0}]}, "data.0.weight 0"),
        ({"held_out": [{"files": "b.txt", "weight": 1}]}, "weight"),
        ({"data": [{"files": "b.jsonl", "text_field": "a", "chat_field": "b"}]}, "text_field"),
        (
            {
                "model": None,
                "config": {},
                "tokenizer": {"vocab_size": 300},
                "data": [{"files": "b.jsonl", "chat_field": "messages"}],
            },
            "trained",
        ),
        ({"data": ["a.txt", {"source": "teacher", "tokens": 5}]}, "only source"),
        ({"data": [{"source": "teacher"}]}, "data.0.tokens"),
        ({"data": [{"source": "student", "tokens": 5}]}, "data.0.source 'student'"),
        ({"data": [{"source": "teacher", "tokens": 5, "temprature": 1}]}, "'temperature'"),
        ({"data": [{"source": "teacher", "tokens": 5, "prompts": {"file": "a"}}]}, "file name"),
        ({"data": [{"source": "teacher", "tokens": 5, "prompts": {"files": "a", "weight": 1}}]}, "weight"),
        ({"held_out": [{"source": "teacher", "tokens": 5}]}, "held_out"),
        (
            {
                "model": None,
                "config": {},
                "tokenizer": {"vocab_size": 300},
                "data": [{"source": "teacher", "tokens": 5}],
            },
            "tokenizer",
        ),
        ({"precision": "int3"}, "'bf16' or 'fp32'"),
        ({"steps": "many"}, "steps 'many'"),
    ],
)
def test_a_slip_is_one_sentence_with_exit_code_2(changes: dict[str, object], words: str) -> None:
    values = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    with pytest.raises(UsageError) as error:
        recipes.parse_recipe(values)
    assert words in str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "override", "words"),
    [
        ("demo-uptran", "steps=1", "Did you mean 'demo-uptrain'?"),
        ("demo-uptrain", "steps", "'steps' is not an override"),
        ("demo-uptrain", "model.name=x", "names no section"),
        ("demo-uptrain", "data=[", "is not YAML"),
    ],
)
def test_a_slip_on_the_command_line_names_what_was_typed(recipe: str, override: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        recipes.load_recipe(recipe, [override])
    assert words in str(error.value)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- just\n- a list\n")
    with pytest.raises(UsageError, match="must hold keys and values"):
        recipes.load_recipe(str(tmp_path / "a.yaml"))


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = (
        "import sys; from uptrain.training import load_recipe; "
        "load_recipe('demo-uptrain'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
