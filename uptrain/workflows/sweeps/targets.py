"""The words of `uptrain sweep --to`: gqa:4, mqa, mla:128, mla:128+32 or mla:25%."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uptrain.errors import UsageError, did_you_mean
from uptrain.methods.registry import METHODS, TARGETS

_EXAMPLES = "Write gqa:4, mqa, mla:128, mla:128+32 or mla:25%."

_SIZES = {
    "gqa": re.compile(r"(?P<groups>\d+)"),
    "mqa": re.compile(r"(?!)"),
    "mla": re.compile(r"(?P<kv_lora_rank>\d+)(?:\+(?P<qk_rope_head_dim>\d+))?|(?P<cache>\d*\.?\d+)%"),
}


@dataclass(frozen=True, kw_only=True)
class SweepTarget:
    """A target of a sweep: the word that names it, and its part of a `Request`."""

    word: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """Return the word in a spelling that is safe in a folder name: gqa4, mla128, mla25pct."""
        return self.word.replace(":", "").replace("%", "pct")


def parse_target(word: str) -> SweepTarget:
    """Return the target that gqa, gqa:4, mqa, mla, mla:128, mla:128+32 or mla:25% names.

    Raises:
        UsageError: the word names no target.
    """
    kind, colon, size = word.partition(":")
    if kind not in TARGETS:
        raise UsageError(f"--to {word} is not known.", _EXAMPLES)
    match = _SIZES[kind].fullmatch(size)
    if colon and match is None:
        raise UsageError(f"--to {word} is no size of {kind}.", _EXAMPLES)
    options: dict[str, Any] = {"target": kind}
    for name, value in (match.groupdict() if match else {}).items():
        if value is not None:
            options[name] = float(value) / 100 if name == "cache" else int(value)
    return SweepTarget(word=word, options=options)


def parse_methods(words: Sequence[str]) -> list[str]:
    """Return the methods without repetitions.

    Raises:
        UsageError: one of them is unknown.
    """
    for word in words:
        if word not in METHODS:
            known = ", ".join(METHODS)
            raise UsageError(f"--methods {word} is not known. Use {known}.", did_you_mean(word, METHODS))
    return list(dict.fromkeys(words))
