"""Refuse checkpoints that transformers' Auto class would load wrongly or not at all, before it tries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import auto_class_name
from uptrain.architectures.prefixes import refuse_foreign
from uptrain.architectures.unknown_models import refuse_wrapper, sections_of
from uptrain.checkpoint.reader import Checkpoint, read_config
from uptrain.checkpoint.source import Source


def check_loadable(source: Source, opened: Checkpoint | None = None) -> None:
    """Refuse a wrapper that has no language model's class, and a family's names under a prefix of a wrapper.

    Such a prefix makes transformers leave every tensor out, and the model it returns random. `opened` is the source's
    checkpoint; without it, where only transformers reads the weights, no names are looked at.

    Raises:
        UsageError: the config is such a wrapper's.
        CheckpointError: the names have such a prefix, or config.json can't be read.
    """
    config = read_config(source.path)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        if sections_of(config) and not _has_class(source, str(config.get("model_type"))):
            raise refuse_wrapper(config, source.name, "load")
        return
    if opened is not None:
        refuse_foreign(family, opened.tensors, source.name)


def auto_class_of(folder: Path) -> Any:
    """Return the Auto class of transformers that loads a checkpoint's language model.

    Raises:
        CheckpointError: config.json is missing or broken.
    """
    import transformers

    return getattr(transformers, auto_class_name(read_config(folder)))


def _has_class(source: Source, model_type: str) -> bool:
    """Tell whether the Auto class that loads the checkpoint has a class for this type."""
    from transformers import CONFIG_MAPPING

    mapping: Any = auto_class_of(source.path)._model_mapping
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in mapping
