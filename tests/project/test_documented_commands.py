"""Every command that the documentation shows runs as it is written, only shorter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from tests.documented import ROOT, commands, documents, furnish, thrifty
from tests.hub_push_server import TOKEN, serve_hub
from uptrain.cli.app import run
from uptrain.training import recipes

IN_CI = {("demo",)}
"""Commands that take minutes, and that CI runs from the README itself."""
SIGNING = {"sign", "--allowed-signers"}
"""Words of commands that need OpenSSH."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("document", documents())
def test_what_a_document_tells_to_type(document: str, here: Path) -> None:
    for words in commands(ROOT / document):
        before, after = _parted(words)
        if before:
            _launched(before, after)
        elif after[0] == "push":
            _pushed(after, here)
        elif tuple(after) not in IN_CI and (shutil.which("ssh-keygen") or not SIGNING & {*after}):
            assert run(thrifty(after)) == 0, words


def test_all_documents_are_read() -> None:
    shown = {tuple(_parted(words)[1][:1]) for document in documents() for words in commands(ROOT / document)}
    assert {("convert",), ("train",), ("eval",), ("push",), ("report",), ("inspect",), ("verify",)} <= shown
    assert len(documents()) >= 12


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """Return what launches uptrain, and what uptrain is told."""
    at = words.index("uptrain")
    return words[:at], words[at + 1 :]


def _launched(launcher: list[str], told: list[str]) -> None:
    """Check a launch that takes more machines than one by the launchers' own parsers, and its recipe by ours."""
    variables = [word for word in launcher if word.partition("=")[0].isupper() and "=" in word]
    program, *options = [word for word in launcher if word not in variables]
    if program == "accelerate":
        parsed = launch_command_parser().parse_args([*_numbers(options[1:]), "uptrain"])
        assert parsed.module
        load_config_from_file(parsed.config_file)
    else:
        assert program == "torchrun"
        assert torchrun_parser().parse_args([*options, "uptrain"]).module
    assert told[0] == "train"
    recipes.load_recipe(told[1], told[2:])


def _numbers(options: list[str]) -> list[str]:
    return ["0" if option.startswith("$RANK") else option for option in options]


def _pushed(told: list[str], here: Path) -> None:
    with serve_hub() as (endpoint, _):
        # The client reads its endpoint when it is imported.
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(here / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "uptrain", *told], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
