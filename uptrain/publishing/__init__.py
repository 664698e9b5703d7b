"""Show results as an HTML page (`page/`) and publish them on the Hub (`hub/`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.publishing.hub.prepare import PushSettings as PushSettings
    from uptrain.publishing.hub.push import push as push
    from uptrain.publishing.page.page import write_page as write_page

_PUBLIC = {
    "PushSettings": "uptrain.publishing.hub.prepare",
    "push": "uptrain.publishing.hub.push",
    "write_page": "uptrain.publishing.page.page",
}

__all__ = ["PushSettings", "push", "write_page"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
