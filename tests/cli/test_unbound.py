"""A command that failed before it did anything binds nobody; one that did something says what it is of."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import checkpoint, corpus
from tests.faults.boundaries import Killed, killed_at, watched
from tests.small import digests, save_small, small_tensors
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.output_folder import STATE, partial_of
from uptrain.checkpoint.source import DEMO
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.conversion.run.options import RunOptions
from uptrain.errors import CheckpointError, Interrupted, UsageError
from uptrain.training.recipes import parse_recipe
from uptrain.training.run import train

MQA = Request("mqa")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("uptrain.conversion.run.pipeline._workers", lambda: 1)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("join", [[], ["--join"]], ids=["alone", "join"])
@pytest.mark.parametrize(
    "typo", [["--calibrate", "txet.txt"], ["--calibrate", "empty.txt"], ["--calibrate", "short.txt"]]
)
def test_a_typo_in_a_conversion_leaves_nothing(typo: list[str], join: list[str], here: Path) -> None:
    (here / "empty.txt").touch()
    (here / "short.txt").write_text("three short words")
    before = names(here)
    assert run(["convert", "demo", "out", "--to", "mqa", *typo, *join]) == 2
    assert names(here) == before
    # Another request is free to use the name, without --overwrite.
    assert run(["convert", "demo", "out", "--to", "gqa", "--groups", "2", *join]) == 0
    assert (here / "out/model.safetensors").is_file()


@pytest.mark.parametrize("join", [False, True], ids=["alone", "join"])
def test_weights_that_cannot_be_converted_bind_nobody(join: bool, here: Path) -> None:
    tensors = small_tensors()
    tensors["model.norm.weight"][0] = float("nan")
    broken = save_small(here / "broken", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        convert(str(broken), "out", MQA, options=RunOptions(join=join))
    assert names(here) == {"broken"}


def test_a_run_that_was_killed_before_its_first_shard_binds_nobody(here: Path) -> None:
    source = save_small(here / "source", 3)
    with watched(here) as seen:
        convert(str(source), here / "undisturbed", MQA)
    first = next(i for i, call in enumerate(seen.calls) if call.name.endswith(".safetensors.tmp"))
    with watched(here, killed_at(first)), pytest.raises(Killed):
        convert(str(source), here / "out", MQA)
    assert (partial_of(here / "out") / STATE).is_file()
    convert(str(source), here / "out", Request("gqa", 2))
    convert(str(source), here / "wanted", Request("gqa", 2))
    assert digests(here / "out") == digests(here / "wanted")


@pytest.mark.parametrize("join", [False, True], ids=["alone", "join"])
def test_an_unfinished_conversion_says_what_it_is_of(join: bool, here: Path) -> None:
    source = save_small(here / "a source", 3)
    with watched(here) as seen:
        convert(str(source), here / "undisturbed", Request("gqa", 2, "first"))
    last = max(i for i, call in enumerate(seen.calls) if call.name.endswith(".safetensors.tmp"))
    with watched(here, killed_at(last)), pytest.raises(Killed):
        convert("a source", here / "out", Request("gqa", 2, "first"))
    with pytest.raises(UsageError, match="unfinished conversion") as caught:
        convert(str(source), here / "out", MQA, options=RunOptions(join=join))
    for word in ("'a source'", "--to gqa", "--groups 2", "--method first"):
        assert word in caught.value.message
    for word in ("seed", "calibrat", "None"):
        assert word not in caught.value.message
    state = partial_of(here / "out") / STATE
    # A state of the version before says less, and binds as well.
    state.write_text(json.dumps({key: value for key, value in json.loads(state.read_text()).items() if key != "asked"}))
    with pytest.raises(UsageError, match="unfinished conversion"):
        convert(str(source), here / "out", MQA, options=RunOptions(join=join))


@pytest.mark.slow
def test_a_calibrated_layer_is_work_that_binds(here: Path) -> None:
    settings: dict[str, Any] = {"method": "calibrated", "calibration_tokens": 2048, "repair_steps": 0}

    def cut(done: int, layers: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        convert("demo", "out", Request("mqa", **settings), events=Events(layer=cut))
    with pytest.raises(UsageError, match="unfinished conversion") as caught:
        convert("demo", "out", MQA)
    assert "--calibration-tokens 2048" in caught.value.message
    layers = names(here / "out.uptrain-calibration")

    def broken(done: int, layers: int) -> None:
        raise CheckpointError("The second layer can't be made.")

    with pytest.raises(CheckpointError):
        convert("demo", "out", Request("mqa", **settings), events=Events(layer=broken))
    assert names(here / "out.uptrain-calibration") > layers
    assert (partial_of(here / "out") / STATE).is_file()


@pytest.fixture
def recipe(here: Path) -> Callable[..., Any]:
    checkpoint(here / "model")
    corpus(here / "text.txt")

    def make(**changes: Any) -> Any:
        values = {"model": "model", "output": "trained", "data": ["text.txt"], "block_size": 16, "batch_size": 2}
        more = {"steps": 3, "learning_rate": 1e-3, "precision": "fp32", "save_every": 1}
        return parse_recipe({**values, **more, **changes})

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "typo",
    [{"data": ["txet.txt"]}, {"block_size": 4096}, {"held_out": ["txet.txt"]}, {"distill": {"teacher": "./nobody"}}],
)
def test_a_typo_in_a_recipe_leaves_nothing(typo: dict[str, Any], recipe: Callable[..., Any], here: Path) -> None:
    before = names(here)
    with pytest.raises(UsageError):
        train(recipe(**typo))
    assert names(here) == before


def test_a_run_without_a_checkpoint_binds_nobody(recipe: Callable[..., Any], here: Path) -> None:
    def killed(step: Any) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(save_every=100, log_every=1), events=Events(step=killed))
    assert (here / "trained.run/recipe.json").is_file()
    done = train(recipe(learning_rate=2e-3))
    assert done is not None and done.resumed_from == 0


@pytest.mark.slow
def test_an_unfinished_run_says_how_its_recipe_differs(recipe: Callable[..., Any], here: Path) -> None:
    def killed(step: Any) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), events=Events(step=killed))
    with pytest.raises(UsageError, match="learning_rate") as caught:
        train(recipe(learning_rate=2e-3))
    assert "0.001" in caught.value.message and "0.002" in caught.value.message
    assert "block_size" not in caught.value.message
    done = train(recipe())
    assert done is not None and done.resumed_from == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "typo", [["--text", "txet.txt"], ["--calibrate", "txet.txt"], ["--text", "empty.txt"], ["--stride", "999999"]]
)
def test_a_typo_in_a_sweep_binds_nobody(typo: list[str], here: Path) -> None:
    (here / "empty.txt").touch()
    corpus(here / "text.txt", 60)
    source = save_small(here / "source")
    shutil.copy(DEMO / "tokenizer.json", source)
    words = ["sweep", "demo", "--to", "mqa", "-o", "out", "--methods", "mean,calibrated", "--context", "32",
             "--tokens", "200"]  # fmt: skip
    assert run([*words, "--calibration-tokens", "2048", "--repair-steps", "0", *typo]) == 2
    assert not (here / "out").exists() or names(here / "out") == set()
    again = [*words[:6], "--methods", "mean", *words[8:], "--text", "text.txt"]
    assert run(again) == 0, sys.stderr


@pytest.mark.slow
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_training_deletes_no_folder_that_somebody_else_made(
    right: bool, restart: bool, here: Path, recipe: Callable[..., Any]
) -> None:
    (here / "trained.run/notes").mkdir(parents=True)
    (here / "trained.run/notes/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"trained\.run.*notes"):
        train(recipe(**({} if right else {"data": ["nowhere.txt"]})), restart=restart)
    assert (here / "trained.run/notes/mine.txt").read_text() == "mine"
    assert names(here / "trained.run") == {"notes"}
