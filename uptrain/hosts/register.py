"""Make our model classes known to transformers' Auto classes without importing it before its time."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register() -> None:
    """Register our classes with AutoConfig, AutoModel and AutoModelForCausalLM; again is harmless."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from uptrain.hosts.modeling_uptrain_gpt2 import (
        UptrainGPT2Config,
        UptrainGPT2LMHeadModel,
        UptrainGPT2Model,
    )

    AutoConfig.register(UptrainGPT2Config.model_type, UptrainGPT2Config, exist_ok=True)
    AutoModel.register(UptrainGPT2Config, UptrainGPT2Model, exist_ok=True)
    AutoModelForCausalLM.register(UptrainGPT2Config, UptrainGPT2LMHeadModel, exist_ok=True)


def register_with_transformers() -> None:
    """Register now if transformers is imported already, else as soon as it is; costs nothing until then."""
    if importlib.util.find_spec("torch") is None or _AfterTransformers.installed:
        return
    if "transformers" in sys.modules:
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
