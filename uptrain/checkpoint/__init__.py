"""Checkpoint folders: read them, write them whole or not at all, and prove their bytes. Knows no model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.checkpoint.manifest import verify as verify
    from uptrain.checkpoint.output_folder import staged_output as staged_output
    from uptrain.checkpoint.reader import open_checkpoint as open_checkpoint

_PUBLIC = {
    "open_checkpoint": "uptrain.checkpoint.reader",
    "staged_output": "uptrain.checkpoint.output_folder",
    "verify": "uptrain.checkpoint.manifest",
}

__all__ = ["open_checkpoint", "staged_output", "verify"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing this package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
