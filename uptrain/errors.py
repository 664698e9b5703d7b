"""Exceptions of uptrain: one message, one hint, and an exit code per kind. Wrapping of foreign errors."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType


class UptrainError(Exception):
    """An error that the user can act on.

    - `message`: one sentence: object, problem and value.
    - `hint`: what to do.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = _plain(message)
        self.hint = _plain(hint)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(UptrainError):
    """A command or a call that can't be carried out. Exit code 2."""

    exit_code = 2


class CheckpointError(UptrainError):
    """A checkpoint that is missing, truncated, corrupt or unsafe. Exit code 1."""


class VerificationError(UptrainError):
    """A file that does not match its manifest. Exit code 3."""

    exit_code = 3


class Interrupted(UptrainError):
    """A run that the user stopped. The same command resumes it. Exit code 130."""

    exit_code = 130


@contextmanager
def reported_as(refusal: Callable[[str], UptrainError]) -> Iterator[None]:
    """Raise `refusal(reason)` instead of any error of the block, also instead of a panic in Rust.

    A panic is not an Exception, so usual handlers miss it, and its class can't be imported.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal(str(error) or type(error).__name__) from None


LONGEST = 2000
"""Characters of a message. A name in a hostile file can be of any length."""


def _plain(text: str) -> str:
    # Names come from files of unknown origin: remove line breaks, terminal codes and megabytes of text.
    text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    text = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "Did you mean 'x'?" for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean '{near[0]}'?" if near else ""


INSTALLS: Mapping[str, str] = MappingProxyType(
    {
        "torch": "uptrain[train]", "transformers": "uptrain[train]", "accelerate": "uptrain[train]",
        "tokenizers": "uptrain[train]", "datasets": "uptrain[train]", "pyarrow": "uptrain[train]",
        "psutil": "uptrain[train]", "lm_eval": "uptrain[eval]", "matplotlib": "uptrain[plots]",
        "jinja2": "uptrain[plots]", "peft": "uptrain[lora]", "bitsandbytes": "bitsandbytes",
    }
)  # fmt: skip
"""What to install with pip, by the package that could not be imported."""


def refusal(error: ImportError, what: str) -> UsageError | None:
    """Return the error for a missing optional package that `what` needs; None for any other failed import."""
    package = str(error.name or "").partition(".")[0]
    if package not in INSTALLS:
        return None
    name = package.replace("_", "-")
    return UsageError(
        f"{what} needs {name}, which is not installed.", f"Install it with: pip install '{INSTALLS[package]}'"
    )


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Turn a failed import of an optional package in the block into an error that names `what` needs it.

    Raises:
        UsageError: an optional package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise refusal(error, what) or error from None


def check_installed(package: str, what: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        with needing(what):
            raise ModuleNotFoundError(name=package)
