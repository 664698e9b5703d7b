"""A measurement stays with the weights it is of, in the words its documentation has."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import checkpoint, corpus
from uptrain.checkpoint.manifest import verify
from uptrain.checkpoint.source import DEMO
from uptrain.cli.app import run
from uptrain.evaluation.tasks import TaskMetric
from uptrain.publishing.hub.card_metrics import read_metrics

DOCS = Path(__file__).parents[2] / "docs/evaluation.md"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    source = checkpoint(tmp_path / "source", "llama", attention_bias=False, max_position_embeddings=160)
    assert run(["convert", str(source), str(tmp_path / "mqa"), "--to", "mqa"]) == 0
    corpus(tmp_path / "one.txt", 30)
    corpus(tmp_path / "two.txt", 40, seed=1)
    return tmp_path / "mqa"


def command(folder: Path, *more: str) -> list[str]:
    texts = [f"--text={folder.parent / name}.txt" for name in ("one", "two")]
    baseline = str(folder.parent / "source")
    return ["eval", str(folder), "--baseline", baseline, *texts, "--context=16,32", "--tokens=150", *more]


def keys_of(table: str) -> set[str]:
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall("`([a-z0-9_]+)`", row)}


def test_every_key_is_documented_and_every_documented_key_is_there(
    converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--needle", "--needle-lengths=120", "--needle-trials=1", "--samples=2", "--sample-tokens=4"]
    more += ["--speed-batch=1", "--speed-context=8"]
    assert run(command(converted, *more, "--json")) == 0
    found: dict[str, Any] = json.loads((converted / "eval.json").read_text())
    whole, each, rows, tasks, needle, samples, speeds, runs = re.split(
        r"\nIn .*:\n", DOCS.read_text().partition("## eval.json")[2]
    )
    assert keys_of(whole) == set(found)
    assert keys_of(each) == set(found["model"]) == set(found["baseline"])
    assert all(keys_of(rows) == set(row) for row in found["rows"])
    assert keys_of(tasks) == {field.name for field in fields(TaskMetric)} | {"run"}
    assert len(found["runs"]) == 1 and keys_of(runs) == set(found["runs"][0])
    assert len(found["needle"]) == 5 and all(keys_of(needle) == set(cell) for cell in found["needle"])
    assert len(found["samples"]) == 4 and all(keys_of(samples) == set(each) for each in found["samples"])
    assert len(found["speeds"]) == 1 and all(keys_of(speeds) == set(cell) for cell in found["speeds"])
    printed = json.loads(capsys.readouterr().out)
    assert {**printed, "versions": found["versions"]} == found


def test_the_folder_still_verifies_and_the_card_reads_it(converted: Path) -> None:
    assert run(command(converted, "--no-speed")) == 0
    verify(converted)
    metrics = read_metrics(converted)
    assert metrics is not None
    assert metrics.text == "one.txt, two.txt"
    assert {"kl_divergence", "top5_agreement", "flip_rate"} <= {row.metric for row in metrics.rows}


def test_a_place_is_chosen_only_in_folders_that_uptrain_wrote(converted: Path) -> None:
    source, elsewhere = converted.parent / "source", converted.parent / "elsewhere.json"
    text = ["--text", str(converted.parent / "one.txt"), "--context=16", "--tokens=60", "--no-speed"]
    assert run(["eval", str(source), *text]) == 0
    assert not (source / "eval.json").exists()
    assert run(["eval", "demo", *text, "--out", str(elsewhere)]) == 0
    assert run(["eval", "demo", *text]) == 0
    assert json.loads(elsewhere.read_text())["model"]["name"] == "demo"
    assert not (DEMO / "eval.json").exists()


def test_what_cannot_be_written_is_reported_before_anything_is_measured(
    converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(command(converted, "--out", str(converted.parent / "nowhere/eval.json"))) == 2
    shown = capsys.readouterr()
    assert "can't be written" in shown.err.replace("\n", " ") and not shown.out
