"""uptrain: make a trained language model cheaper to serve without making it dumber."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from uptrain.hosts.register import register_with_transformers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from uptrain.checkpoint.manifest import verify as verify
    from uptrain.convert import convert as convert
    from uptrain.errors import UptrainError as UptrainError
    from uptrain.evaluate import evaluate as evaluate
    from uptrain.hub import push as push
    from uptrain.inspect import inspect as inspect
    from uptrain.loading import load as load
    from uptrain.request import Request as Request
    from uptrain.sweep import sweep as sweep
    from uptrain.train import train as train

_PUBLIC = {
    "Request": "uptrain.request",
    "UptrainError": "uptrain.errors",
    "convert": "uptrain.convert",
    "evaluate": "uptrain.evaluate",
    "inspect": "uptrain.inspect",
    "load": "uptrain.loading",
    "push": "uptrain.hub",
    "sweep": "uptrain.sweep",
    "train": "uptrain.train",
    "verify": "uptrain.checkpoint.manifest",
}

__all__ = ["Request", "UptrainError", "convert", "evaluate", "inspect", "load", "push", "sweep", "train", "verify"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import uptrain` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'uptrain' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """This package, in which a public function stays one: importing a submodule of its name would replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _PUBLIC or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_with_transformers()
