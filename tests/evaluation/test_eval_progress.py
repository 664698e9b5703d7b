"""Every part of an evaluation reports its progress to the end, and a terminal shows it as bars."""

from __future__ import annotations

import io
import sys
from itertools import groupby
from pathlib import Path

import pytest

from tests.corpus import checkpoint, corpus
from uptrain.checkpoint.events import Events
from uptrain.cli import console
from uptrain.data.sources import Files
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.evaluation.settings import NeedleSettings


@pytest.mark.parametrize("stride", [None, 16])
def test_each_part_counts_up_to_all_of_it(tmp_path: Path, stride: int | None) -> None:
    folder = str(checkpoint(tmp_path / "model", n_positions=160))
    texts = [Files(files=str(corpus(tmp_path / f"{seed}.txt", 30, seed))) for seed in (0, 1)]
    seen: list[tuple[str, int, int]] = []
    settings = EvaluationSettings(
        text=texts, context=[16, 32], stride=stride, tokens=100, speed_context=[8, 20], speed_batch=2, decode_tokens=2,
        repeats=1, needle=NeedleSettings(lengths=(120,), depths=(0.0, 1.0), trials=2), samples=1, sample_tokens=3,
    )  # fmt: skip
    found = evaluate(folder, settings, baseline=folder, events=Events(part=lambda *report: seen.append(report)))
    parts = {part: [report[1:] for report in each] for part, each in groupby(seen, key=lambda report: report[0])}
    totals = {part: {total for _, total in reports} for part, reports in parts.items()}
    scored = sum(row.tokens for row in found.rows if row.text != "all")
    # Two models: two depths of two prompts; an opening of each text; two batches and contexts, warmed up and timed.
    assert totals == {"Scoring": {scored}, "Needles": {8}, "Samples": {4}, "Speed": {16}}
    for part, reports in parts.items():
        done = [count for count, _ in reports]
        assert done == sorted(set(done)) and done[-1] in totals[part]


def test_a_terminal_shows_a_bar_for_each_part_though_others_are_kept_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with console.parts_progress() as show:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        show("Needles", 3, 8)
        show("Speed", 1, 4)
        # What the last refresh, at the end, finds.
        show("Speed", 2, 4)
    assert all(words in screen.getvalue() for words in ("Needles", "3/8", "Speed", "2/4"))


def test_what_is_no_terminal_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with console.parts_progress() as show:
        show("Needles", 3, 8)
    assert capsys.readouterr().err == ""
