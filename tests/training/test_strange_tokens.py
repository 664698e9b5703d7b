"""A tokenizer of another model: its tokens are refused by name where the model has no place for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from uptrain.checkpoint.source import DEMO
from uptrain.cli.app import run

COMMANDS = {
    "convert": ["OUT", "--to", "mqa", "--calibrate", "builtin", "--calibration-tokens", "2048"],
    "eval": ["--tokens", "2048", "--no-speed"],
}


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """The demo, whose tokenizer gives one common token a number that the model has no embedding of."""
    folder = tmp_path / "strange"
    shutil.copytree(DEMO, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["e"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_measuring_and_calibrating_name_the_token(
    command: str, strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([command, str(strange), *(each.replace("OUT", str(out)) for each in COMMANDS[command])]) in (1, 2)
    said = capsys.readouterr().err
    assert "70000" in said and "4096" in said and "Traceback" not in said and not out.exists()


@pytest.mark.slow
def test_training_names_the_token(strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [f"model={strange}", f"output={tmp_path / 'up'}", "tokens=2048", "batch_size=1", "block_size=1024"]
    assert run(["train", "gqa-uptrain", *values, "data=[python-stdlib]", "distill=null"]) == 2
    said = capsys.readouterr().err
    assert "70000" in said and "4096" in said and "Traceback" not in said
