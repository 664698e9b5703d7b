"""Text to tokens to blocks: which text sources there are, and readers of token blocks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.data.readers import open_reader as open_reader
    from uptrain.data.sources import parse_source as parse_source
    from uptrain.data.token_text import read_tokens as read_tokens

_PUBLIC = {
    "open_reader": "uptrain.data.readers",
    "parse_source": "uptrain.data.sources",
    "read_tokens": "uptrain.data.token_text",
}

__all__ = ["open_reader", "parse_source", "read_tokens"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing this package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
