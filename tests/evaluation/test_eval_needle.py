"""Retrieval is what generating with transformers, and its own log-probabilities, give on the same prompts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.corpus import checkpoint, corpus
from uptrain.checkpoint.source import resolve
from uptrain.cli.app import run
from uptrain.evaluation.intervals import interval, wilson
from uptrain.evaluation.needle import Prompt, ask, prompts
from uptrain.models import loading
from uptrain.models.opened import open_model


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_a_share_s_interval_holds_what_the_score_test_would_not_reject(trials: int, share: float) -> None:
    """Wilson's ends are the two p for which |share − p| is 1.96 standard errors under p."""
    successes = round(share * trials)
    for end in wilson(successes, trials):
        away = abs(successes / trials - end)
        assert away == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials), abs=1e-6)


@pytest.mark.parametrize("length", [120, 301])
def test_prompts_have_their_length_and_hide_the_key_where_they_say(length: int) -> None:
    tokenizer = loading.load_tokenizer(resolve("demo").path)
    filler = tokenizer("def once(upon, a, time):\n    return there\n" * 9)["input_ids"]
    for depth in (0, 0.25, 1):
        for prompt in prompts(tokenizer, filler, length, depth, 3):
            assert len(prompt.ids) + len(prompt.key) == length
            key, text = tokenizer.decode(prompt.key).strip(), tokenizer.decode(prompt.ids)
            assert f"The pass key is {key}. Remember it. {key} is the pass key." in text
            assert text.endswith("\nWhat is the pass key? The pass key is")
            before = tokenizer(text[: text.index("\nThe pass key")])["input_ids"]
            rest = length - len(
                tokenizer(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")["input_ids"]
            )
            rest -= len(tokenizer(f"\nWhat is the pass key? The pass key is {key}")["input_ids"])
            assert abs(len(before) - depth * rest) <= 2
    assert len({tokenizer.decode(prompt.key) for prompt in prompts(tokenizer, filler, length, 0, 20)}) > 15


def test_a_key_is_found_exactly_when_greedy_generation_writes_it(tmp_path: Path) -> None:
    model = loading.load_model(open_model(resolve("demo"))).float().eval()
    ids = loading.load_tokenizer(resolve("demo").path)("import os\n\ndef main():\n    for name in os.")["input_ids"]
    written = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
    found, nats = ask(model, Prompt(ids, written))
    assert found and nats < 0
    for at in range(4):
        other = [*written]
        other[at] = (other[at] + 1) % 4096
        assert not ask(model, Prompt(ids, other))[0]


def test_cells_are_the_brute_force_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "model", n_positions=160)
    other = shutil.copytree(folder, tmp_path / "other")
    noisy = {n: t + 0.05 * torch.randn_like(t) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(noisy, other / "model.safetensors", {"format": "pt"})
    corpus(tmp_path / "text.txt", 40)
    command = ["eval", str(folder), "--baseline", str(other), "--text", str(tmp_path / "text.txt"), "--json"]
    needle = ["--needle", "--needle-lengths=140", "--needle-depths=0,50", "--needle-trials=3"]
    assert run([*command, "--context=32", "--tokens=200", "--no-speed", *needle]) == 0
    cells = json.loads(capsys.readouterr().out)["needle"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(140, 0), (140, 0.5)]
    tokenizer = loading.load_tokenizer(folder)
    filler = tokenizer((tmp_path / "text.txt").read_text(), add_special_tokens=False)["input_ids"][:200]
    pair = [loading.load_model(open_model(resolve(name))).float().eval() for name in (str(folder), str(other))]
    for cell in cells:
        sums: list[list[float]] = [[], []]
        asked = prompts(tokenizer, filler, cell["length"], cell["depth"], 3)
        for model, nats, prefix in zip(pair, sums, ("", "baseline_"), strict=True):
            exact = 0
            for prompt in asked:
                ids = torch.tensor([[*prompt.ids, *prompt.key]])
                with torch.no_grad():
                    loss = model(ids, labels=torch.tensor([[*[-100] * len(prompt.ids), *prompt.key]])).loss
                nats.append(-float(loss) * len(prompt.key))
                written = model.generate(ids[:, : len(prompt.ids)], max_new_tokens=len(prompt.key), do_sample=False)
                exact += written[0, len(prompt.ids) :].tolist() == prompt.key
            counts = [len(prompt.key) for prompt in asked]
            assert cell["samples"] == 3
            assert cell[f"{prefix}exact_match"] == exact / 3
            assert cell[f"{prefix}exact_match_interval"] == pytest.approx(wilson(exact, 3))
            assert cell[f"{prefix}log_probability"] == pytest.approx(sum(nats) / sum(counts), rel=1e-4)
            assert cell[f"{prefix}log_probability_interval"] == pytest.approx(interval(nats, counts), rel=1e-3)
        apart = interval([one - other for one, other in zip(*sums, strict=True)], counts)
        assert cell["difference_interval"] == pytest.approx(apart, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(("length", "words"), [("20", "A needle and its question are"), ("65", "longer than the 64")])
def test_lengths_that_cannot_be_asked_are_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], length: str, words: str
) -> None:
    folder, text = checkpoint(tmp_path / "model"), corpus(tmp_path / "text.txt", 20)
    command = ["eval", str(folder), "--text", str(text), "--context=32", "--no-speed", "--needle"]
    assert run([*command, "--needle-lengths", length]) == 2
    shown = capsys.readouterr()
    assert words in shown.err.replace("\n", " ") and not shown.out
