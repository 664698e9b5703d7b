"""What can go wrong, each with one sentence for the user and an exit code by kind."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType


class UptrainError(Exception):
    """Say what failed in one sentence, and in `hint` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = _plain(message)
        self.hint = _plain(hint)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(UptrainError):
    """A request that can't be carried out as it was typed."""

    exit_code = 2


class CheckpointError(UptrainError):
    """A checkpoint that is missing, cut, corrupt or unsafe."""


class VerificationError(UptrainError):
    """Bytes that don't match what their manifest says."""

    exit_code = 3


class Interrupted(UptrainError):
    """A run stopped by the user, which the same command resumes."""

    exit_code = 130


@contextmanager
def told_as(refusal: Callable[[str], UptrainError]) -> Iterator[None]:
    """Turn whatever is raised in the block into the `refusal` that its reason gives, a panic in Rust too.

    A panic is no Exception, so that handlers let it pass, and its class can't be imported.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal(str(error) or type(error).__name__) from None


LONGEST = 2000
"""Characters of a message; names out of a hostile file can have any number."""


def _plain(text: str) -> str:
    # Names come from files that anybody may have written: no line breaks, no terminal codes, no megabytes.
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
"""What pip is asked for, by the package that something could not import."""


def refusal(error: ImportError, what: str) -> UsageError | None:
    """Return what to say where `what` could not import an optional package; None for any other import that failed."""
    package = str(error.name or "").partition(".")[0]
    if package not in INSTALLS:
        return None
    name = package.replace("_", "-")
    return UsageError(
        f"{what} needs {name}, which is not installed.", f"Install it with: pip install '{INSTALLS[package]}'"
    )


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Import what `what` needs in the block.

    Raises:
        UsageError: an optional package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise refusal(error, what) or error from None


def check_installed(package: str, what: str) -> None:
    """Make sure that an optional package is there, without importing it.

    Raises:
        UsageError: it isn't.
    """
    if importlib.util.find_spec(package) is None:
        with needing(what):
            raise ModuleNotFoundError(name=package)
