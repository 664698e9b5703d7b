"""Without a --baseline, an evaluation compares with what the checkpoint was converted from, if that is here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import checkpoint, corpus
from uptrain.cli.app import run
from uptrain.evaluation.baseline import find_baseline


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "source", "llama", attention_bias=False)
    assert run(["convert", "source", "mqa", "--to", "mqa"]) == 0
    corpus(tmp_path / "one.txt", 30)
    return tmp_path


def measure(folder: str, *more: str) -> dict[str, Any]:
    words = ["--text", "one.txt", "--context", "16", "--tokens", "60", "--no-speed"]
    assert run(["eval", folder, *words, *more, "--out", "found.json"]) == 0
    found: dict[str, Any] = json.loads(Path("found.json").read_text())
    Path("found.json").unlink()
    return found


def test_the_source_is_the_baseline_and_a_line_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = measure("mqa", "--baseline", "source")
    capsys.readouterr()
    found = measure("mqa")
    reported = capsys.readouterr().err
    assert "Comparing with" in reported and "source" in reported and "--no-baseline" in reported
    assert found["kl"] == named["kl"] > 0 and found["baseline"]["name"] == "source"
    assert measure("mqa", "--no-baseline")["baseline"] is None
    # A model without a history gets no note.
    capsys.readouterr()
    assert measure("source")["baseline"] is None
    assert "aseline" not in capsys.readouterr().err


def test_a_source_of_a_trained_or_twice_converted_result_is_the_first_one(here: Path) -> None:
    assert run(["convert", "source", "half", "--to", "gqa", "--groups", "2"]) == 0
    assert run(["convert", "half", "twice", "--to", "mqa"]) == 0
    assert measure("twice")["baseline"]["name"] == "source"


@pytest.mark.parametrize("how", ["gone", "other weights", "other config", "other files", "elsewhere"])
def test_without_it_the_result_is_measured_alone_and_a_line_says_why(
    how: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "gone":
        shutil.rmtree(here / "source")
    if how == "other weights":
        shutil.rmtree(here / "source")
        checkpoint(here / "source", "llama", attention_bias=False, initializer_range=0.3)
    if how == "other config":
        config = json.loads((here / "source/config.json").read_text())
        (here / "source/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    if how == "other files":
        # Other weights, and under a name that the conversion didn't see.
        shutil.rmtree(here / "source")
        checkpoint(here / "source", "llama", attention_bias=False, initializer_range=0.3)
        config = json.loads((here / "source/config.json").read_text())
        (here / "source/config.json").write_text(json.dumps({**config, "transformers_weights": "own.safetensors"}))
        (here / "source/model.safetensors").rename(here / "source/own.safetensors")
    if how == "elsewhere":
        (here / "other").mkdir()
        shutil.copy("one.txt", here / "other")
        monkeypatch.chdir(here / "other")
    capsys.readouterr()
    assert measure(str(here / "mqa"))["baseline"] is None
    reported = capsys.readouterr().err
    assert "without a baseline" in reported and "--baseline MODEL" in reported and "source" in reported


def test_nothing_is_downloaded_for_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((here / "mqa/uptrain.json").read_text())
    revision = "c0ffee" * 6 + "beef"
    manifest["stages"][0]["source"] |= {"name": "org/model", "origin": "hub", "revision": revision}
    (here / "mqa/uptrain.json").write_text(json.dumps(manifest))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    source, note = find_baseline("mqa")
    assert source is None and "org/model" in note and "cache" in note
    # Nor is it where the history names another kind of place.
    manifest["stages"][0]["source"] |= {"origin": "elsewhere"}
    (here / "mqa/uptrain.json").write_text(json.dumps(manifest))
    assert find_baseline("mqa")[0] is None
    manifest["stages"][0]["source"] |= {"origin": "hub"}
    (here / "mqa/uptrain.json").write_text(json.dumps(manifest))
    # In the cache, it is taken, at the commit that was converted.
    cached = here / "cache/models--org--model/snapshots" / revision
    shutil.copytree(here / "source", cached)
    source, note = find_baseline("mqa")
    assert source is not None and source.path == cached and source.revision == revision


def test_both_ways_to_say_it_at_once_are_refused(here: Path) -> None:
    assert run(["eval", "mqa", "--baseline", "source", "--no-baseline"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["other weights", "the result itself"])
def test_what_is_not_the_source_any_more_is_no_teacher(
    how: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = here / "mqa", here / "one.txt"
    if how == "other weights":
        shutil.rmtree(here / "source")
        checkpoint(here / "source", "llama", attention_bias=False, initializer_range=0.3)
    else:  # The name that the source was converted by, in the folder of the result.
        monkeypatch.chdir(here / "source")
        assert run(["convert", ".", str(here / "own"), "--to", "mqa"]) == 0
        model = here / "own"
        monkeypatch.chdir(model)
    values = [f"model={model}", f"output={here / 'up'}", f"data=[{text}]", "tokens=64", "block_size=16", "batch_size=2"]
    capsys.readouterr()
    assert run(["train", "gqa-uptrain", *values]) == 2
    reported = capsys.readouterr().err
    assert "The teacher" in reported and "is not what" in reported and "distill.teacher=MODEL" in reported
    assert not (here / "up").exists() and not (here / "up.run").exists()
    # Named, it is whatever the user names.
    assert run(["train", "gqa-uptrain", *values, f"distill.teacher={here / 'source'}"]) == 0


def test_metrics_of_another_text_by_the_same_name_are_stale(here: Path) -> None:
    words = ["eval", "mqa", "--text", "one.txt", "--context", "16", "--tokens", "60", "--no-speed"]
    assert run(words) == 0
    before = json.loads((here / "mqa/eval.json").read_text())
    corpus(here / "one.txt", 30, seed=7)
    assert run([*words, "--no-baseline"]) == 0
    found = json.loads((here / "mqa/eval.json").read_text())
    assert [row["perplexity"] for row in found["stale"]["rows"]] == [row["perplexity"] for row in before["rows"]]
    assert [row["kl"] for row in found["rows"]] == [None] and found["kl"] is None
    assert found["rows"][0]["perplexity"] != before["rows"][0]["perplexity"]
