"""Check that the tokenizer of a folder loads."""

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
"""Exit code of tokenizer_probe.py for a tokenizer that does not load. The reason is on its stdout."""
QUICK, WHOLE = "quick", "whole"
"""Its modes: without torch, which few tokenizers need and which takes seconds to import, and with it."""
_PATIENCE = 120.0
"""Time limit in seconds. The largest tokenizers load in a few."""


def check_tokenizer(directory: Path, names: Collection[str], on_note: Callable[[str], None]) -> None:
    """Check the tokenizer of a folder. Code in the folder is never run.

    - `directory`: the folder.
    - `names`: the files that will be published.
    - `on_note`: called with a sentence on what can't be checked.

    Raises:
        CheckpointError: there is no tokenizer, transformers can't load it, or code that it names is missing.
    """
    if not any(_FILES.fullmatch(name) and (directory / name).is_file() for name in names):
        raise CheckpointError(
            f"{directory} has no tokenizer, so nobody can use it.",
            "Put the tokenizer's files, such as tokenizer.json, into the source's folder and convert again.",
        )
    lacking = sorted(name for name in code_named(directory) if name not in names)
    if lacking:
        raise CheckpointError(
            f"{directory} lacks code of its tokenizer or processor: {short(lacking)}.",
            "Put it into the source's folder and convert again.",
        )
    if "AutoTokenizer" in reading_code_of(directory):
        on_note("The tokenizer has its own code, which push does not run, so whether it loads is not checked.")
        return
    if importlib.util.find_spec("transformers") is None:
        on_note("transformers is not installed, so whether the tokenizer loads is not checked.")
        return
    reason: str | None = ""
    for mode in (QUICK, WHOLE) if importlib.util.find_spec("torch") else (QUICK,):
        reason = _reason(directory, mode)
        if reason == "":
            return
    if reason is None:
        on_note("The tokenizer could not be tried, so whether it loads is not checked.")
        return
    raise CheckpointError(
        f"{directory} has no tokenizer that transformers can load: {reason.rstrip('.')}.",
        "Complete its files in the source's folder and convert again, or install what transformers asks for.",
    )


def _reason(directory: Path, mode: str) -> str | None:
    """Return why transformers can't load the tokenizer: empty if it can, None if that is unknown."""
    try:
        done = child_process.ask(
            "uptrain.publishing.hub.tokenizer_probe", str(directory.resolve()), mode, seconds=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == REFUSED:
        return " ".join(done.stdout.split()) or "no reason is given"
    return "" if done.returncode == 0 else None
