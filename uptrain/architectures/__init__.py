"""Model families as data, and what a config.json says of attention."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.architectures.attention import AttentionSpec as AttentionSpec
    from uptrain.architectures.description import ModelDescription as ModelDescription
    from uptrain.architectures.description import describe as describe

_PUBLIC = {
    "AttentionSpec": "uptrain.architectures.attention",
    "ModelDescription": "uptrain.architectures.description",
    "describe": "uptrain.architectures.description",
}

__all__ = ["AttentionSpec", "ModelDescription", "describe"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing this package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
