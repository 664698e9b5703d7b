"""Training: a recipe, the loop that runs it, and the checkpoint it gives."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.training.recipe import Recipe as Recipe
    from uptrain.training.recipes import load_recipe as load_recipe
    from uptrain.training.run import train as train

_PUBLIC = {
    "Recipe": "uptrain.training.recipe",
    "load_recipe": "uptrain.training.recipes",
    "train": "uptrain.training.run",
}

__all__ = ["Recipe", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing this package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
