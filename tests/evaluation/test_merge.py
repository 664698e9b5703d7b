"""A later measurement that measured less takes nothing away; one of other weights does not mix with the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.corpus import checkpoint, corpus
from uptrain.cli.app import run
from uptrain.publishing import push
from uptrain.publishing.hub.card_metrics import read_metrics
from uptrain.publishing.page.models import find_models


@pytest.fixture
def here(tmp_path: Path) -> Path:
    sizes = {"attention_bias": False, "max_position_embeddings": 160}
    checkpoint(tmp_path / "source", "llama", **sizes)
    assert run(["convert", str(tmp_path / "source"), str(tmp_path / "mqa"), "--to", "mqa"]) == 0
    for name, lines in (("one", 30), ("two", 40)):
        corpus(tmp_path / f"{name}.txt", lines, seed=lines)
    return tmp_path


def measure(here: Path, *more: str, text: str = "one", against: str = "source", context: str = "16") -> dict[str, Any]:
    against_words = ["--baseline", str(here / against)] if against else ["--no-baseline"]
    words = ["--text", str(here / f"{text}.txt"), "--context", context, "--tokens", "90", *against_words]
    assert run(["eval", str(here / "mqa"), *words, *more]) == 0
    found: dict[str, Any] = json.loads((here / "mqa/eval.json").read_text())
    return found


def keys(found: dict[str, Any]) -> set[tuple[str, int]]:
    return {(Path(row["text"]).stem, row["context"]) for row in found["rows"]}


def run_of(found: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    return dict(found["runs"][entry["run"]])


def change(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.25)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


EVERYTHING = ("--speed-context", "8", "--samples", "1", "--needle", "--needle-lengths", "120", "--needle-trials", "1")


def test_what_was_not_measured_again_stays_as_it_was(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = measure(here, *EVERYTHING, context="16,32")
    capsys.readouterr()
    found = measure(here, "--no-speed")
    reported = capsys.readouterr().err
    assert all(word in reported for word in ("speed", "retrieval", "samples", "quality"))
    for part in ("speeds", "needle", "samples"):
        assert found[part] == whole[part]
        assert all(run_of(found, entry)["settings"]["contexts"] == [16, 32] for entry in found[part])
    assert keys(found) == {("one", 16), ("one", 32)}
    for name in ("model", "baseline"):
        for metric in ("decode_tokens_per_second", "prefill_tokens_per_second", "decode_range"):
            assert found[name][metric] == whole[name][metric] is not None
    assert (found["speed_context"], found["speed_repeats"]) == (8, 5)
    # The metrics outside the lists are those of the newest run.
    assert (found["context"], whole["context"]) == (16, 32)
    assert found["model"]["perplexity"] == next(row["perplexity"] for row in found["rows"] if row["context"] == 16)
    metrics = read_metrics(here / "mqa")
    assert metrics is not None and "context 16" in metrics.conditions
    assert {title for title, _ in metrics.tables} >= {"By text and context", "Retrieval of a hidden pass key"}


def test_another_text_and_fewer_tokens_are_measurements_of_their_own(here: Path) -> None:
    measure(here, "--no-speed")
    measure(here, "--no-speed", text="two")
    found = measure(here, "--no-speed", "--tokens", "40")
    assert sorted((Path(row["text"]).stem, row["tokens"]) for row in found["rows"]) == [
        ("one", 39), ("one", 89), ("two", 89),
    ]  # fmt: skip
    again = measure(here, "--no-speed")
    assert len(again["rows"]) == 3 and len(again["runs"]) == 3, "measured again, it takes the old one's place"


def test_a_run_without_a_baseline_does_not_take_a_comparison_away(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = measure(here, "--no-speed")
    capsys.readouterr()
    found = measure(here, "--no-speed", against="")
    assert "baseline" in capsys.readouterr().err
    assert found["kl"] == compared["kl"] and found["baseline"]["perplexity"] == compared["baseline"]["perplexity"]
    assert found["rows"] == compared["rows"]


@pytest.mark.parametrize("whose", ["mqa", "source"], ids=["the model's", "the baseline's"])
def test_other_weights_make_what_was_measured_stale(whose: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = measure(here, *EVERYTHING)
    change(here / whose)
    capsys.readouterr()
    found = measure(here, "--no-speed", text="two")
    assert "stale" in capsys.readouterr().err
    assert keys(found) == {("two", 16)} and not found["needle"] and not found["speeds"]
    assert found["model"]["decode_tokens_per_second"] is None
    stale = found["stale"]
    assert [len(stale[part]) for part in ("rows", "needle", "samples", "speeds")] == [1, 5, 1, 1]
    old, new = run_of(found, stale["needle"][0]), run_of(found, found["rows"][0])
    assert old["weights" if whose == "mqa" else "baseline"] != new["weights" if whose == "mqa" else "baseline"]
    assert {key: stale["rows"][0][key] for key in ("text", "kl")} == {
        key: before["rows"][0][key] for key in ("text", "kl")
    }
    # Of the report and the card only what is of these weights is read.
    metrics = read_metrics(here / "mqa")
    assert metrics is not None and not any("pass key" in title for title, _ in metrics.tables)


def test_what_is_stale_comes_back_with_its_weights(here: Path) -> None:
    measure(here, "--no-speed", "--samples", "1")
    shutil.copyfile(here / "mqa/model.safetensors", here / "kept")
    change(here / "mqa")
    assert not measure(here, "--no-speed", text="two")["samples"]
    shutil.copyfile(here / "kept", here / "mqa/model.safetensors")
    found = measure(here, "--no-speed", text="two")
    assert len(found["samples"]) == 1 and keys(found) == {("one", 16), ("two", 16)}
    assert set(found["stale"]) == {"rows"}


def test_a_changed_config_is_another_model(here: Path) -> None:
    measure(here, "--no-speed", "--samples", "1")
    config = json.loads((here / "mqa/config.json").read_text())
    config["rms_norm_eps"] = 1e-2
    (here / "mqa/config.json").write_text(json.dumps(config))
    assert not measure(here, "--no-speed", text="two")["samples"]


def test_a_file_of_the_version_before_is_read_and_nothing_of_it_is_lost(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = measure(here, *EVERYTHING)
    old = {key: value for key, value in new.items() if key not in ("runs", "parts", "stale")}
    for part in ("rows", "needle", "samples", "speeds"):
        old[part] = [{key: value for key, value in entry.items() if key != "run"} for entry in old[part]]
    (here / "mqa/eval.json").write_text(json.dumps(old))
    metrics = read_metrics(here / "mqa")
    assert metrics is not None and any("pass key" in title for title, _ in metrics.tables)
    (subject,) = find_models(here / "mqa")
    assert subject.evaluation is not None and subject.metric("kl") == new["kl"]
    capsys.readouterr()
    found = measure(here, "--no-speed", text="two")
    assert "stale" in capsys.readouterr().err
    assert len(found["stale"]["needle"]) == 5 and run_of(found, found["stale"]["needle"][0])["weights"] is None


@pytest.mark.parametrize("broken", ["{", "[]", '{"runs": 3, "rows": {"a": 1}, "stale": [1]}', '{"runs": [1]}'])
def test_a_broken_file_is_reported_and_stops_nothing(
    broken: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mqa/eval.json").write_text(broken)
    found = measure(here, "--no-speed")
    assert keys(found) == {("one", 16)} and list(here.glob("mqa/*.tmp")) == []
    assert ("could be read" in capsys.readouterr().err) == (broken in ("{", "[]"))


def test_the_report_says_that_other_weights_were_measured(here: Path) -> None:
    measure(here, "--no-speed")
    (subject,) = find_models(here / "mqa")
    assert subject.evaluation is not None
    change(here / "mqa")
    assert run(["convert", str(here / "source"), str(here / "mqa2"), "--to", "mqa", "--method", "first"]) == 0
    shutil.copyfile(here / "mqa/eval.json", here / "mqa2/eval.json")
    assert run(["report", str(here / "mqa2")]) == 0
    page = (here / "mqa2/report.html").read_text()
    assert "other weights" in page
    (subject,) = find_models(here / "mqa2")
    assert subject.evaluation is None


@pytest.mark.slow
def test_a_card_has_nothing_of_other_weights(here: Path) -> None:
    measure(here, "--no-speed")
    prepared = push(here / "mqa", "me/small", license="mit", dry_run=True)
    assert "## Evaluation" in prepared.card and "eval.json" in prepared.files
    assert run(["convert", str(here / "source"), str(here / "other"), "--to", "mqa", "--method", "first"]) == 0
    shutil.copyfile(here / "mqa/eval.json", here / "other/eval.json")
    prepared = push(here / "other", "me/small", license="mit", dry_run=True)
    assert "## Evaluation" not in prepared.card and "eval.json" not in prepared.files
    assert any("other weights" in note for note in prepared.notes)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [None, "none", {"speed_contexts": 3}])
def test_what_another_hand_has_broken_costs_no_measurement(settings: Any, here: Path) -> None:
    found = measure(here, "--speed-context", "8")
    found["runs"][0]["settings"] = settings
    (here / "mqa/eval.json").write_text(json.dumps(found))
    after = measure(here, "--no-speed", against="", text="two")
    assert keys(after) == {("one", 16), ("two", 16)} and after["kl"] == found["kl"]
