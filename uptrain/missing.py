"""Say which optional package is missing, and what installs it, in one way for every command."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from uptrain.errors import UsageError

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
