"""Tasks of lm-eval say what log-likelihoods computed with plain transformers say, offline, from local files."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from uptrain.checkpoint.events import Events
from uptrain.checkpoint.source import resolve
from uptrain.cli.app import run
from uptrain.data.sources import Files
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.evaluation.settings import TaskSettings
from uptrain.models import loading
from uptrain.models.opened import open_model

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs uptrain[eval]")

CHOICES = [
    {"text": f"import os\n\nfor {name} in", "choices": ["range(10):", "else return", "try except"], "answer": place % 3}
    for place, name in enumerate("abcdefgh")
]
NEXT = [
    {"text": f"def {name}(self):\n    return", "next": f" self.{name}"} for name in ("name", "value", "items", "key")
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
CHOOSING = """output_type: multiple_choice
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GOING_ON = """output_type: loglikelihood
doc_to_target: "{{next}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, documents, rest in (("choosing", CHOICES, CHOOSING), ("going_on", NEXT, GOING_ON)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path) + rest)
    (tmp_path / "text.txt").write_text("import os\n" * 30)
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    return ["eval", "demo", "--text", str(folder / "text.txt"), "--context=32", "--tokens=40", "--no-speed", *more]


def likelihood(model: Any, tokenizer: Any, text: str, continuation: str) -> float:
    before, whole = (tokenizer(each)["input_ids"] for each in (text, text + continuation))
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, whole[at]]) for at in range(len(before), len(whole)))


def expected(name: str) -> dict[str, list[float]]:
    source = resolve(name)
    model, tokenizer = loading.load_model(open_model(source)).float().eval(), loading.load_tokenizer(source.path)
    sure = [[likelihood(model, tokenizer, d["text"], f" {choice}") for choice in d["choices"]] for d in CHOICES]
    answers = [int(d["answer"]) for d in CHOICES]
    lengths = [len(choice) for choice in CHOICES[0]["choices"]]
    by_length = [[value / length for value, length in zip(values, lengths, strict=True)] for values in sure]
    return {
        "acc": [float(max(range(3), key=v.__getitem__) == a) for v, a in zip(sure, answers, strict=True)],
        "acc_norm": [float(max(range(3), key=v.__getitem__) == a) for v, a in zip(by_length, answers, strict=True)],
        "perplexity": [likelihood(model, tokenizer, d["text"], d["next"]) for d in NEXT],
    }


@needs_harness
def test_two_local_tasks_give_what_transformers_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "mqa"
    assert run(["convert", "demo", str(converted), "--to", "mqa"]) == 0
    names = f"{folder / 'choosing.yaml'},going_on"
    more = ["--baseline", str(converted), "--task", names, "--include-path", str(folder), "--json"]
    capsys.readouterr()
    assert run([*command(folder, *more)]) == 0
    found = {each["metric"]: each for each in json.loads(capsys.readouterr().out)["tasks"]}
    assert {each["task"] for each in found.values()} == {"choosing", "going_on"}
    ours, theirs = expected("demo"), expected(str(converted))
    for metric in ("acc", "acc_norm"):
        row = found[metric]
        assert (row["samples"], row["higher_is_better"]) == (8, True)
        for values, prefix in ((ours[metric], ""), (theirs[metric], "baseline_")):
            assert row[f"{prefix}value"] == pytest.approx(statistics.mean(values))
            assert row[f"{prefix}stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(8))
        apart = [one - other for one, other in zip(ours[metric], theirs[metric], strict=True)]
        # 2.365: Student's t for 7 degrees of freedom.
        half = 2.365 * statistics.stdev(apart) / math.sqrt(8)
        low, high = statistics.mean(apart) - half, statistics.mean(apart) + half
        assert row["difference_interval"] == pytest.approx([low, high], abs=1e-6)
    row = found["perplexity"]
    assert (row["samples"], row["higher_is_better"], row["difference_interval"]) == (4, False, None)
    assert row["value"] == pytest.approx(math.exp(-statistics.mean(ours["perplexity"])), rel=1e-4)
    assert row["baseline_value"] == pytest.approx(math.exp(-statistics.mean(theirs["perplexity"])), rel=1e-4)
    # The bootstrap of exp(−mean) has about the delta method's error.
    delta = row["value"] * statistics.pstdev(ours["perplexity"]) / math.sqrt(4)
    assert row["stderr"] == pytest.approx(delta, rel=0.5)


@needs_harness
def test_every_answer_is_counted(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    tasks = TaskSettings(names=(str(folder / "choosing.yaml"), str(folder / "going_on.yaml")), limit=3)
    text = Files(files=str(folder / "text.txt"))
    settings = EvaluationSettings(text=[text], context=32, tokens=40, repeats=0, tasks=tasks)
    evaluate("demo", settings, baseline="demo", events=Events(part=lambda *report: seen.append(report)))
    # Two models, three documents: three choices each, and one continuation each.
    assert [report for report in seen if report[0] == "Tasks"] == [("Tasks", done, 24) for done in range(1, 25)]


@needs_harness
def test_a_table_shows_them_and_a_limit_takes_fewer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--task", str(folder / "choosing.yaml"), "--task-limit", "3"]
    assert run(command(folder, *more)) == 0
    shown = capsys.readouterr()
    assert any(line.split()[:3] == ["choosing", "acc", "3"] for line in shown.out.splitlines())
    assert "±" in shown.out and "bootstrapping" not in shown.out + shown.err


@needs_harness
def test_what_cannot_run_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "choosing.jsonl").unlink()
    for name, words in ((str(folder / "choosing.yaml"), "can't load"), (str(folder / "no.yaml"), "There is no file")):
        assert run(command(folder, "--task", name)) == 2
        shown = capsys.readouterr()
        assert words in shown.err.replace("\n", " ") and not shown.out
    assert run(command(folder, "--task", "x", "--include-path", str(folder / "none"))) == 2
    assert "folder" in capsys.readouterr().err.replace("\n", " ")


def test_without_the_harness_its_install_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(command(folder, "--task", str(folder / "choosing.yaml"))) == 2
    assert "pip install 'uptrain[eval]'" in capsys.readouterr().err.replace("\n", " ")
