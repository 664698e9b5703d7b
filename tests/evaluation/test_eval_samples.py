"""Samples are what transformers' greedy generation writes after the text's own openings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.corpus import checkpoint
from uptrain.checkpoint.source import resolve
from uptrain.cli.app import run
from uptrain.evaluation.samples import PROMPT_TOKENS, openings
from uptrain.models import loading
from uptrain.models.opened import open_model

DOCUMENTS = ["the quick brown fox jumps over a lazy dog " * 9, "too short", "seven wizards brew strange tea " * 9]


def command(folder: Path, *more: str) -> list[str]:
    text = folder.parent / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in DOCUMENTS))
    return ["eval", str(folder), "--text", str(text), "--context=32", "--no-speed", "--sample-tokens=12", *more]


def test_both_models_write_what_generate_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = checkpoint(tmp_path / "baseline")
    other = shutil.copytree(baseline, tmp_path / "other")
    noisy = {n: t + 0.05 * torch.randn_like(t) for n, t in load_file(baseline / "model.safetensors").items()}
    save_file(noisy, other / "model.safetensors", {"format": "pt"})
    assert run(command(other, "--baseline", str(baseline), "--samples=2", "--json")) == 0
    found = json.loads(capsys.readouterr().out)["samples"]
    tokenizer = loading.load_tokenizer(baseline)
    assert len(found) == 2
    for sample, document in zip(found, (DOCUMENTS[0], DOCUMENTS[2]), strict=True):
        ids = tokenizer(document)["input_ids"][:PROMPT_TOKENS]
        assert sample["prompt"] == tokenizer.decode(ids)
        written = []
        for name in (other, baseline):
            model = loading.load_model(open_model(resolve(str(name)))).eval()
            out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
            written.append(out[0, len(ids) :].tolist())
        texts = [tokenizer.decode(each, skip_special_tokens=True) for each in written]
        assert [sample["continuation"], sample["baseline_continuation"]] == texts
        same = [one == two for one, two in zip(*written, strict=False)]
        assert sample["common_tokens"] == [*same, False].index(False)


def test_a_text_of_one_document_is_opened_at_several_places() -> None:
    ids = np.arange(1, 201)
    assert [prompt[0] for prompt in openings(ids, [0], 3)] == [1, 57, 113]
    assert all(len(prompt) == PROMPT_TOKENS for prompt in openings(ids, [0], 3))
    (short,) = openings(ids[:5], [0], 1)
    assert short.tolist() == [1, 2, 3, 4, 5]


def test_more_than_the_model_takes_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(checkpoint(tmp_path / "model"), "--samples=1", "--sample-tokens=40")) == 2
    shown = capsys.readouterr()
    assert " 64" in shown.err.replace("\n", " ") and not shown.out
