"""Make our model classes known to transformers' Auto classes without importing it before its time."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from uptrain.architectures.description import auto_class_name
from uptrain.checkpoint.reader import read_config

# Our modelling files: each one's config, body and language model.
OWN_CLASSES: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "modeling_uptrain_gpt2": ("UptrainGPT2Config", "UptrainGPT2Model", "UptrainGPT2LMHeadModel"),
        "modeling_uptrain_bloom": ("UptrainBloomConfig", "UptrainBloomModel", "UptrainBloomForCausalLM"),
        "modeling_uptrain_gpt_neo": ("UptrainGPTNeoConfig", "UptrainGPTNeoModel", "UptrainGPTNeoForCausalLM"),
        "modeling_uptrain_mpt": ("UptrainMptConfig", "UptrainMptModel", "UptrainMptForCausalLM"),
        "modeling_uptrain_bart": ("UptrainBartConfig", "UptrainBartModel", "UptrainBartForConditionalGeneration"),
        "modeling_uptrain_umt5": ("UptrainUMT5Config", "UptrainUMT5Model", "UptrainUMT5ForConditionalGeneration"),
        "modeling_uptrain_whisper": (
            "UptrainWhisperConfig", "UptrainWhisperModel", "UptrainWhisperForConditionalGeneration",
        ),
        "modeling_uptrain_t5": ("UptrainT5Config", "UptrainT5Model", "UptrainT5ForConditionalGeneration"),
        "modeling_uptrain_opt": ("UptrainOPTConfig", "UptrainOPTModel", "UptrainOPTForCausalLM"),
        "modeling_uptrain_persimmon": (
            "UptrainPersimmonConfig",
            "UptrainPersimmonModel",
            "UptrainPersimmonForCausalLM",
        ),
        "modeling_uptrain_gpt2_mla": ("UptrainGPT2MLAConfig", "UptrainGPT2MLAModel", "UptrainGPT2MLALMHeadModel"),
        "modeling_uptrain_llama_mla": ("UptrainLlamaMLAConfig", "UptrainLlamaMLAModel", "UptrainLlamaMLAForCausalLM"),
    }
)  # fmt: skip


def register() -> None:
    """Register our classes with transformers' Auto classes; again is harmless."""
    import transformers
    from transformers import AutoConfig, AutoModel

    for file, names in OWN_CLASSES.items():
        module = importlib.import_module(f"uptrain.models.remote_code.{file}")
        config, model, language_model = (getattr(module, name) for name in names)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        auto_class = getattr(transformers, auto_class_name({"model_type": config.model_type}))
        auto_class.register(config, language_model, exist_ok=True)


def own_class(name: str) -> Any:
    """Return our model class of that name, None where there is none."""
    for file, names in OWN_CLASSES.items():
        if name in names[1:]:
            return getattr(importlib.import_module(f"uptrain.models.remote_code.{file}"), name)
    return None


def auto_class_of(folder: Path) -> Any:
    """Return the Auto class of transformers that loads a checkpoint's language model.

    Raises:
        CheckpointError: config.json is missing or broken.
    """
    import transformers

    return getattr(transformers, auto_class_name(read_config(folder)))


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
