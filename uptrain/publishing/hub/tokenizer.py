"""Check that whoever loads a published folder gets a tokenizer from it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path

from uptrain.checkpoint.sidecars import code_named, reading_code_of, short
from uptrain.errors import CheckpointError
from uptrain.models import child_process

_FILES = re.compile(r"tokenizer.*\.json|tokenizer.*\.model.*|vocab\..*|tekken.*\.json|.*\.(model|tiktoken|spm)")
REFUSED = 3
"""Exit code of tokenizer_probe.py for a tokenizer that doesn't load; the reason is on its stdout."""
QUICK, WHOLE = "quick", "whole"
"""Its ways: without torch, which few tokenizers need and which takes seconds, and with all that uptrain knows."""
_PATIENCE = 120.0
"""Seconds for trying a tokenizer; the largest load in a few."""


def check_tokenizer(directory: Path, names: Collection[str], on_note: Callable[[str], None]) -> None:
    """Check the tokenizer of `directory`, of whose files `names` are published; `on_note` hears what can't be checked.

    Code that the folder brings is never run.

    Raises:
        CheckpointError: it has none, or transformers can't load it, or code that it names is missing.
    """
    if not any(_FILES.fullmatch(name) and (directory / name).is_file() for name in names):
        raise CheckpointError(
            f"{directory} has no tokenizer, so nobody could use it.",
            "Put a tokenizer's files, such as tokenizer.json, beside the source's config.json and convert again.",
        )
    lacking = sorted(name for name in code_named(directory) if name not in names)
    if lacking:
        raise CheckpointError(
            f"{directory} lacks code that its tokenizer or processor names: {short(lacking)}.",
            "Put it beside the source's config.json and convert again.",
        )
    if "AutoTokenizer" in reading_code_of(directory):
        on_note("The tokenizer brings its own code, which push doesn't run: whether it loads is not checked.")
        return
    if importlib.util.find_spec("transformers") is None:
        on_note("Without transformers, whether the tokenizer loads is not checked.")
        return
    reason: str | None = ""
    for way in (QUICK, WHOLE) if importlib.util.find_spec("torch") else (QUICK,):
        reason = _tried(directory, way)
        if reason == "":
            return
    if reason is None:
        on_note("The tokenizer could not be tried here, so whether it loads is not checked.")
        return
    raise CheckpointError(
        f"{directory} has no tokenizer that transformers can load: {reason.rstrip('.')}.",
        "Complete its files in the source's folder and convert again, or install what transformers asks for.",
    )


def _tried(directory: Path, way: str) -> str | None:
    """Return why transformers can't load the tokenizer, empty if it can, None if that can't be found out."""
    try:
        done = child_process.ask(
            "uptrain.publishing.hub.tokenizer_probe", str(directory.resolve()), way, seconds=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == REFUSED:
        return " ".join(done.stdout.split()) or "no reason is given"
    return "" if done.returncode == 0 else None
