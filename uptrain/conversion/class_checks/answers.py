"""Store in the user's cache what transformers' classes answered, so that only the first conversion waits for them.

An answer is stored under a digest of the question, of the installed versions and of our own modelling files. Those are
all that decides it, so a stored answer never goes stale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from uptrain.checkpoint.locks import alone_in
from uptrain.checkpoint.manifest import versions
from uptrain.data.token_cache import cache_root
from uptrain.models.target import REMOTE_CODE

SECONDS = 600
"""How long a child process may take to answer."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class AnswerFormat(Generic[Answer]):
    """How answers of one kind are stored as JSON.

    - `write`: returns an answer's JSON values; None for an answer that may be another next time.
    - `read`: returns what `write` was given; raises KeyError, TypeError or ValueError for any other JSON.
    """

    write: Callable[[Answer], Any]
    read: Callable[[Any], Answer]


def find_answers(
    questions: Sequence[str], form: AnswerFormat[Answer], ask: Callable[[], list[Answer]], *, alone: bool
) -> list[Answer]:
    """Return the answers to questions: the stored ones or, where one of them is not stored, all from `ask`.

    - `questions`: as text; equal questions have equal texts.
    - `form`: how answers are stored.
    - `ask`: asks all the questions.
    - `alone`: let one process at a time ask, so that conversions that start together start one child, not one each.
    """
    found = [_stored(text, form) for text in questions]
    if None in found:
        with _alone() if alone else nullcontext():
            found = [_stored(text, form) for text in questions] if alone else found
            if None in found:
                fresh = ask()
                for text, answer in zip(questions, fresh, strict=True):
                    _store(text, answer, form)
                return fresh
    return [answer for answer in found if answer is not None]


def _stored(question: str, form: AnswerFormat[Answer]) -> Answer | None:
    """Return the stored answer; None where there is none that can be read."""
    place = _place()
    with suppress(OSError, ValueError, KeyError, TypeError):
        if place is not None:
            return form.read(json.loads((place / f"{_digest(question)}.json").read_text()))
    return None


def _store(question: str, answer: Answer, form: AnswerFormat[Answer]) -> None:
    """Store an answer. A cache that can't be written is done without."""
    place, written = _place(), form.write(answer)
    if place is None or written is None:
        return
    digest = _digest(question)
    partial = place / f"{digest}.{os.getpid()}.partial"
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(written))
        partial.replace(place / f"{digest}.json")


def _alone() -> AbstractContextManager[None]:
    place = _place()
    with suppress(OSError):
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
            return alone_in(place)
    return nullcontext()


def _place() -> Path | None:
    root = cache_root()
    return None if root is None else root / "classes"


def _digest(question: str) -> str:
    return hashlib.sha256(f"{_versions()}\n{question}".encode()).hexdigest()


@cache
def _versions() -> str:
    # A change of our own classes between versions counts too.
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in REMOTE_CODE.glob("*.py"))
    return json.dumps([versions(), files])
