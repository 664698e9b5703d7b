"""The card's own words load a tokenizer beside our modelling file without a question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.corpus import checkpoint
from uptrain.checkpoint.reader import read_config
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.publishing.hub.card import build_card
from uptrain.publishing.hub.licence import Licence
from uptrain.publishing.hub.subject import CardSubject

TEXT = "the quick brown fox ✓ — ąę"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "request_"), [("gpt2", Request("gqa", 2)), ("gpt2", Request("mla", cache=0.5)),
                                                  ("bloom", Request("gqa", 2))])  # fmt: skip
def test_the_tokenizer_of_a_card_loads_without_a_question(family: str, request_: Request, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", family)
    out = convert(str(source), tmp_path / "out", request_).out
    assert list(out.glob("*.py"))
    stages = json.loads((out / "uptrain.json").read_text())["stages"]
    card = str(
        build_card(CardSubject("me/small", stages, read_config(out), None), Licence("mit", "a test"), None, ({}, ""))
    )
    (line,) = (line for line in card.splitlines() if line.startswith("tokenizer = "))
    script = (
        f"from transformers import AutoTokenizer\n{line.replace('me/small', str(out))}\n"
        f"print(tokenizer({TEXT!r})['input_ids'], type(tokenizer).__name__)"
    )
    # Nothing of ours is imported there, and nobody is there to answer.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    wanted = AutoTokenizer.from_pretrained(source)
    assert done.stdout.split("]")[0] == str(wanted(TEXT)["input_ids"])[:-1]
