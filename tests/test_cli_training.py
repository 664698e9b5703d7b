"""What the training commands print is what their help promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training import NO_DROPOUT, checkpoint, corpus
from uptrain import recipes
from uptrain.cli import run


def test_recipes_are_listed_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipes.shipped())
    assert run(["recipes", "copy", "gqa-uptrain"]) == 0
    assert recipes.load("gqa-uptrain.yaml") == recipes.load("gqa-uptrain")
    assert run(["recipes", "copy", "gqa-uptrain"]) == 2
    capsys.readouterr()
    assert run(["recipes", "show", "gqa-uptrain"]) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "gqa-uptrain.yaml").read_text().strip()


def test_train_then_eval_on_ones_own_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "model", **NO_DROPOUT)
    text = str(corpus(tmp_path / "text.txt"))
    values = {"model": source, "output": tmp_path / "out", "data": f"[{text}]", "steps": 5, "block_size": 32}
    overrides = [f"{key}={value}" for key, value in values.items()]
    assert run(["train", "gqa-uptrain", *overrides, "batch_size=4", "learning_rate=1e-2", "warmup=0"]) == 0
    assert "5 steps, 640 tokens on 1 process(es)" in capsys.readouterr().out
    command = ["eval", str(tmp_path / "out"), "--baseline", str(source), "--text", text, "--context", "64"]
    assert run([*command, "--no-speed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["perplexity"] < found["baseline"]["perplexity"]
    assert found["kl"] > 0
    assert run([*command, "--no-speed"]) == 0
    shown = capsys.readouterr().out
    assert f"{found['model']['perplexity']:.3f}" in shown
    assert "decode" not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "gqa-uptran"], 2, "Did you mean 'gqa-uptrain'?"),
        (["train", "gqa-uptrain", "learning_rat=1"], 2, "Did you mean 'learning_rate'?"),
        (["eval", "./nowhere"], 2, "no folder ./nowhere"),
    ],
)
def test_a_slip_is_one_sentence_and_the_right_code(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert run(arguments) == code
    assert words in capsys.readouterr().err.replace("\n", " ")
