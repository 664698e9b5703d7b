"""A mixture keeps its shares at every length, loses no block of its sources, and resumes where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus import NO_DROPOUT, checkpoint, sentences, tokenizer
from tests.training.test_train import interrupt_at
from uptrain.checkpoint.events import Events
from uptrain.data.block_reader import BlockReader
from uptrain.data.mixture import Mixture
from uptrain.data.readers import build_tokens, open_reader
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_file import TokenFile
from uptrain.data.token_stream import TokenStream
from uptrain.errors import Interrupted, UsageError
from uptrain.training import recipes, train


class Counting:
    """A reader whose block says which reader gave it and how many it gave before."""

    def __init__(self, name: int) -> None:
        self.name, self.given = name, 0

    def take(self, count: int) -> np.ndarray[Any, Any]:
        out = np.array([[self.name, self.given + index] for index in range(count)])
        self.given += count
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


def mixture(weights: Sequence[float], seed: int) -> Mixture:
    return Mixture([Counting(name) for name in range(len(weights))], weights, seed)


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=2, max_size=5)


@settings(deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**32), blocks=st.integers(1, 2000))
def test_any_length_holds_every_share_to_within_a_few_blocks(weights: list[float], seed: int, blocks: int) -> None:
    names = mixture(weights, seed).take(blocks)[:, 0]
    for name, weight in enumerate(weights):
        assert abs((names == name).sum() - blocks * weight / sum(weights)) < 4


@settings(deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 9), takes=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_the_order_does_not_depend_on_how_many_are_taken_at_once_and_skips_no_block(
    weights: list[float], seed: int, takes: list[int]
) -> None:
    reader = mixture(weights, seed)
    parts = np.concatenate([reader.take(count) for count in takes])
    assert (parts == mixture(weights, seed).take(sum(takes))).all()
    for name in range(len(weights)):
        mine = parts[parts[:, 0] == name, 1]
        assert mine.tolist() == list(range(len(mine)))


def test_another_seed_is_another_order() -> None:
    assert (mixture([1, 2], 1).take(60)[:, 0] != mixture([1, 2], 2).take(60)[:, 0]).any()


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


def mixed_data(tmp_path: Path) -> list[dict[str, Any]]:
    rows = tmp_path / "rows"
    if not rows.exists():
        rows.mkdir()
        lines = [json.dumps({"text": sentences(5, seed)}) + "\n" for seed in range(40)]
        (rows / "a.jsonl").write_text("".join(lines))
        (tmp_path / "a.txt").write_text(sentences(100, 90))
        (tmp_path / "b.txt").write_text(sentences(30, 91))
    return [
        {"files": str(tmp_path / "a.txt"), "weight": 2},
        {"dataset": str(rows), "stream": True, "weight": 1},
        {"files": str(tmp_path / "b.txt"), "weight": 1},
    ]


def open_recipe(tmp_path: Path, words: Any, **changes: Any) -> BlockReader:
    data = mixed_data(tmp_path)
    recipe = recipes.parse_recipe({"model": "m", "output": "o", "steps": 1, "data": data, **changes})
    folders = build_tokens(recipe.data, TextEncoder(words), tmp_path / "run")
    return open_reader(recipe.data, TextEncoder(words), folders, 16, recipe.seed)


@pytest.mark.parametrize("taken", [0, 1, 37, 400])
def test_a_mixture_of_files_and_a_stream_goes_on_with_the_very_next_block(
    tmp_path: Path, words: Any, taken: int
) -> None:
    undisturbed, resumed = open_recipe(tmp_path, words), open_recipe(tmp_path, words)
    if taken:
        undisturbed.take(taken)
    resumed.load_state_dict(json.loads(json.dumps(undisturbed.state_dict())))
    assert (resumed.take(50) == undisturbed.take(50)).all()


def test_a_mixture_gives_each_sources_own_blocks_in_its_own_order(tmp_path: Path, words: Any) -> None:
    reader = open_recipe(tmp_path, words)
    assert isinstance(reader, Mixture)
    assert [type(part) for part in reader.readers] == [TokenFile, TokenStream, TokenFile]
    chosen = reader.source_of(np.arange(80))
    blocks = reader.take(80)
    for index, alone in enumerate(open_recipe(tmp_path, words).readers):  # type: ignore[attr-defined]
        assert (blocks[chosen == index] == alone.take(int((chosen == index).sum()))).all()


def test_one_weighted_source_is_that_source(tmp_path: Path, words: Any) -> None:
    open_recipe(tmp_path, words)
    one = {"files": str(tmp_path / "a.txt")}
    plain = open_recipe(tmp_path, words, data=[one]).take(20)
    assert (open_recipe(tmp_path, words, data=[{**one, "weight": 3}]).take(20) == plain).all()


def test_a_position_in_another_mixture_is_refused() -> None:
    with pytest.raises(UsageError, match="weights in data changed"):
        mixture([1, 2], 0).load_state_dict(mixture([1, 1], 0).state_dict())


@pytest.mark.slow
def test_a_mixed_run_that_was_cut_off_and_lost_its_cache_ends_at_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPTRAIN_CACHE", str(tmp_path / "cache"))
    checkpoint(tmp_path / "model", **NO_DROPOUT)

    def run(name: str, until: int = 8) -> Path:
        values = {"model": str(tmp_path / "model"), "output": str(tmp_path / name), "data": mixed_data(tmp_path),
                  "block_size": 32, "batch_size": 4, "steps": 8, "learning_rate": 1e-2}  # fmt: skip
        train(recipes.parse_recipe(values), events=Events(step=interrupt_at(until)) if until < 8 else Events())
        return tmp_path / name / "model.safetensors"

    whole = run("whole").read_bytes()
    with pytest.raises(Interrupted):
        run("cut", until=3)
    shutil.rmtree(tmp_path / "cache")
    assert run("cut").read_bytes() == whole
