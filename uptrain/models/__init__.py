"""Classes of models: which one holds a result, uptrain's own, and how every one is loaded and computed with."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.models.loading import load as load
    from uptrain.models.targets import choose_target as choose_target

_PUBLIC = {
    "choose_target": "uptrain.models.targets",
    "load": "uptrain.models.loading",
}

__all__ = ["choose_target", "load"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing this package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
