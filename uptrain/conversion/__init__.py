"""Convert models: what a user asks, what the model can become, the plan and its run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.conversion.inspection import inspect as inspect
    from uptrain.conversion.request import Request as Request
    from uptrain.conversion.run.convert import convert as convert
    from uptrain.conversion.run.options import RunOptions as RunOptions
    from uptrain.conversion.run.prepare import plan_conversion as plan_conversion
    from uptrain.conversion.suggestion import suggest as suggest

_PUBLIC = {
    "Request": "uptrain.conversion.request",
    "RunOptions": "uptrain.conversion.run.options",
    "convert": "uptrain.conversion.run.convert",
    "inspect": "uptrain.conversion.inspection",
    "plan_conversion": "uptrain.conversion.run.prepare",
    "suggest": "uptrain.conversion.suggestion",
}

__all__ = ["Request", "RunOptions", "convert", "inspect", "plan_conversion", "suggest"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing this package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
