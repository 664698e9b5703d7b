"""Calibration on several texts: each is held out in part, each has its own error, and each is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.corpus import NO_DROPOUT, checkpoint, corpus
from uptrain.checkpoint.events import Events
from uptrain.conversion.calibration.layer_search import held_out
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UsageError


@pytest.mark.parametrize("text_of", [(0, 1) * 16, (0,) * 30 + (1, 1), (0, 1, 0, 2) * 8])
def test_of_every_text_a_block_is_held_out_and_a_block_is_not(text_of: tuple[int, ...]) -> None:
    held = held_out(len(text_of), 1 / 16, text_of)
    for text in set(text_of):
        own = {block for block, of in enumerate(text_of) if of == text}
        assert held & own and own - held


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Write a text of the model's own words and one of numbers."""
    numbers = tmp_path / "numbers.txt"
    numbers.write_text(" ".join(str(number) for number in range(4000)))
    return corpus(tmp_path / "words.txt"), numbers


def calibrate(tmp_path: Path, name: str, calibrate: str, events: Events = Events()) -> dict[str, object]:
    if not (tmp_path / "model").exists():
        checkpoint(tmp_path / "model", **NO_DROPOUT)
    request = Request(
        "gqa", 2, "calibrated", calibrate=calibrate, calibration_tokens=512, calibration_block=32, repair_steps=2
    )
    convert(str(tmp_path / "model"), tmp_path / name, request, events=events)
    stages = json.loads((tmp_path / name / "uptrain.json").read_text())["stages"]
    found: dict[str, object] = stages[-1]["calibration"]
    return found


def test_each_text_is_recorded_with_its_tokens_and_its_error(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    notes: list[str] = []
    words, numbers = texts
    found = calibrate(tmp_path, "two", f"{words}:3,{numbers}:1", Events(note=notes.append))
    recorded, layers = found["text"], found["layers"]
    assert isinstance(recorded, dict) and isinstance(layers, list)
    assert [(text["name"], text["weight"], text["tokens"]) for text in recorded["texts"]] == [
        (str(words), 3, 384), (str(numbers), 1, 128),
    ]  # fmt: skip
    for layer in layers:
        by_text, error = layer["choice"]["error_by_text"], layer["choice"]["error"]
        # The error of all held-out blocks is a weighted mean of the texts' errors.
        assert min(by_text) <= error * (1 + 1e-6) and error <= max(by_text) * (1 + 1e-6)
    assert any("numbers.txt" in note and "%" in note for note in notes)


def test_one_text_is_recorded_as_before_and_a_block_can_be_too_long(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    found = calibrate(tmp_path, "one", str(texts[0]))
    assert isinstance(found["text"], dict) and sorted(found["text"]) == ["name", "token_digest", "tokens"]
    request = Request("gqa", 2, "calibrated", calibrate=str(texts[0]), calibration_block=100_000)
    with pytest.raises(UsageError, match="--calibration-block 100000 is longer"):
        convert(str(tmp_path / "model"), tmp_path / "other", request)
