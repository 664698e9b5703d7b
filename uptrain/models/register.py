"""Register uptrain's own model classes with transformers' Auto classes, once transformers is imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from uptrain.architectures.own_classes import OWN_CLASSES, OwnClass


def register() -> None:
    """Register our classes with transformers' Auto classes; again is harmless."""
    import transformers

    for own in OWN_CLASSES.values():
        module = _module_of(own)
        config = getattr(module, own.config_class)
        transformers.AutoConfig.register(own.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, getattr(module, own.model_class), exist_ok=True)
        auto_class = getattr(transformers, own.auto_class)
        auto_class.register(config, getattr(module, own.head_class), exist_ok=True)


def own_class(name: str) -> Any:
    """Return our model class of that name, None where there is none."""
    for own in OWN_CLASSES.values():
        if name in (own.model_class, own.head_class):
            return getattr(_module_of(own), name)
    return None


def _module_of(own: OwnClass) -> ModuleType:
    return importlib.import_module(f"uptrain.models.remote_code.{own.module}")


def register_with_transformers() -> None:
    """Register now if transformers is imported already, else as soon as it is; costs nothing until then."""
    if importlib.util.find_spec("torch") is None or _AfterTransformers.installed:
        return
    if sys.modules.get("transformers") is not None:
        register()
    else:
        _AfterTransformers.installed = True
        sys.meta_path.insert(0, _AfterTransformers())


class _AfterTransformers:
    """Find `transformers` as Python would, and register our classes once its own code has run."""

    installed = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # A mere find_spec("transformers") finds it too, so the finder stays until a real import.
            sys.meta_path.remove(self)
            try:
                register()
            except ImportError as error:
                # Too old a transformers or torch is no reason for `import transformers` to fail.
                warnings.warn(f"uptrain could not register its model classes: {error}", stacklevel=2)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
