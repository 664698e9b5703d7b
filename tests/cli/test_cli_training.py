"""What the training commands print is what their help promises."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.corpus import NO_DROPOUT, checkpoint, corpus
from uptrain.cli import console
from uptrain.cli.app import run
from uptrain.training import recipes
from uptrain.training.metrics import TrainingStep


def test_recipes_are_listed_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipes.shipped())
    assert run(["recipes", "copy", "gqa-uptrain"]) == 0
    assert recipes.load_recipe("gqa-uptrain.yaml") == recipes.load_recipe("gqa-uptrain")
    assert run(["recipes", "copy", "gqa-uptrain"]) == 2
    capsys.readouterr()
    assert run(["recipes", "show", "gqa-uptrain"]) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "gqa-uptrain.yaml").read_text().strip()


@pytest.mark.slow
def test_train_then_eval_on_ones_own_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "model", **NO_DROPOUT)
    text = str(corpus(tmp_path / "text.txt"))
    values = {"model": source, "output": tmp_path / "out", "data": f"[{text}]", "steps": 5, "block_size": 32}
    overrides = [f"{key}={value}" for key, value in values.items()]
    assert (
        run(["train", "gqa-uptrain", *overrides, "batch_size=4", "learning_rate=1e-2", "warmup=0", "distill=null"]) == 0
    )
    shown = capsys.readouterr().out
    assert "5 steps, 640 tokens on 1 process" in shown and "processes" not in shown
    command = ["eval", str(tmp_path / "out"), "--baseline", str(source), "--text", text, "--context", "64"]
    assert run([*command, "--no-speed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["perplexity"] < found["baseline"]["perplexity"]
    assert found["kl"] > 0
    assert run([*command, "--no-speed"]) == 0
    shown = capsys.readouterr().out
    assert f"{found['model']['perplexity']:.3f}" in shown
    assert "decode" not in shown


@pytest.mark.parametrize(("hidden", "told"), [(False, range(2, 20, 2)), (True, [])])
def test_a_log_file_gets_a_line_at_every_tenth_and_nothing_else(
    hidden: bool, told: Iterable[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.training_progress(20, hidden) as show:
        for step in range(1, 21):
            show(
                TrainingStep(
                    step=step,
                    steps=20,
                    tokens=64 * step,
                    loss=2.0,
                    learning_rate=1e-4,
                    grad_norm=1.0,
                    tokens_per_second=900.0,
                    seconds_left=20.0 - step,
                )
            )
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"Step {step} of 20" for step in told]


@pytest.mark.slow
def test_plot_draws_the_run_and_belongs_to_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    source = checkpoint(tmp_path / "model", "llama", attention_bias=False)
    assert run(["convert", str(source), str(tmp_path / "gqa"), "--groups", "2"]) == 0
    text = str(corpus(tmp_path / "text.txt"))
    values = {
        "model": tmp_path / "gqa", "output": tmp_path / "out", "data": f"[{text}]", "steps": 6, "block_size": 32,
        "batch_size": 4, "warmup": 0, "distill": "{}", "held_out": f"[{text}]", "held_out_tokens": 64, "eval_every": 2,
        "log_every": 1,
    }  # fmt: skip
    assert run(["train", "gqa-uptrain", *(f"{key}={value}" for key, value in values.items()), "--plot"]) == 0
    shown = capsys.readouterr()
    assert f"teacher{source}" in "".join(shown.out.split())
    # Not on a terminal, progress is a few plain lines.
    assert "Step 3 of 6: loss" in shown.err
    assert "Step 2: held-out loss" in shown.err
    with Image.open(tmp_path / "out/training.png") as picture:
        assert len({*picture.convert("RGB").get_flattened_data()}) > 10
    assert run(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "gqa-uptran"], 2, "Did you mean 'gqa-uptrain'?"),
        (["train", "gqa-uptrain", "learning_rat=1"], 2, "Did you mean 'learning_rate'?"),
        (["eval", "./nowhere"], 2, "no folder ./nowhere"),
        (["eval", "demo", "--context", "64,x"], 2, "Write it like 512,1024"),
        (["eval", "demo", "--context", "64,1"], 2, "1 is less than 2"),
    ],
)
def test_a_slip_is_one_sentence_and_the_right_code(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert run(arguments) == code
    assert words in capsys.readouterr().err.replace("\n", " ")
