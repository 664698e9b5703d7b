"""The embedded model has learnt from text it is not tested on, is what its recipe says, and shows the whole way."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.demo_quality import quality
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import verify
from uptrain.checkpoint.source import DEMO
from uptrain.data.stdlib_text import documents, is_held_out
from uptrain.training import recipes
from uptrain.training.metrics import TrainingStep
from uptrain.workflows import run_demo


def test_train_and_held_out_text_share_no_document() -> None:
    train, held_out = list(documents("train")), list(documents("held-out"))
    assert not set(train) & set(held_out)
    size, rest = sum(map(len, held_out)), sum(map(len, train))
    assert size > 200_000
    assert 0.02 < size / (size + rest) < 0.15


def test_the_split_goes_by_name_alone() -> None:
    # On another Python version a module must not change sides, or the model would be tested on its own lessons.
    assert [name for name in ("argparse", "ast", "bdb", "calendar", "cmd", "csv", "enum") if is_held_out(name)] == [
        "cmd"
    ]


def test_the_checkpoint_is_small_whole_and_made_by_its_recipe() -> None:
    manifest = verify(DEMO)
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 10_000_000
    (stage,) = manifest["stages"]
    # Keys that came later say in the recipe what was done then.
    shipped = recipes.load_recipe("demo-pretrain").to_dict()
    assert {key: shipped.get(key) for key in stage["recipe"]} == stage["recipe"]
    assert (DEMO / "train_log.jsonl").is_file()


@pytest.mark.slow
def test_it_has_learnt_more_than_counting_or_compressing_gives() -> None:
    found = quality(tokens=16_384)
    assert found["model"] < 0.7 * found["unigram"]
    assert found["model"] < found["gzip"]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [20_480])
def test_the_whole_way_ends_nearer_to_the_original_than_it_began(tmp_path: Path, tokens: int) -> None:
    stages: list[str] = []
    steps: list[TrainingStep] = []
    found = run_demo(
        tmp_path, tokens=4096, overrides=(f"tokens={tokens}",), events=Events(note=stages.append, step=steps.append)
    )
    assert len(stages) == 4
    assert len(steps) == recipes.load_recipe("demo-uptrain", [f"tokens={tokens}"]).total_steps
    assert found.converted.model.cache_bytes_per_token * 2 == found.original.cache_bytes_per_token
    assert found.original.perplexity < found.converted.model.perplexity
    assert found.uptrained.kl is not None
    assert found.converted.kl is not None
    assert found.uptrained.kl < found.converted.kl
    assert {path.name for path in tmp_path.iterdir()} == {"demo-gqa4", "demo-gqa4-uptrained"}
