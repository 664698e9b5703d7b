"""Refuse checkpoints that transformers' Auto class would load wrongly or not at all, before it tries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import auto_class_name
from uptrain.architectures.prefixes import refuse_foreign
from uptrain.architectures.unknown_models import refuse_wrapper, sections_of
from uptrain.models.opened import OpenedModel


def check_loadable(model: OpenedModel) -> None:
    """Refuse a wrapper that has no language model's class, and a family's names under a prefix of a wrapper.

    Such a prefix makes transformers leave every tensor out, and the model it returns random. Where only
    transformers reads the weights, no names are looked at.

    Raises:
        UsageError: the config is such a wrapper's.
        CheckpointError: the names have such a prefix.
    """
    config = model.config
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        if not _has_class(config) and sections_of(config):
            raise refuse_wrapper(config, model.name, "load")
        return
    if model.checkpoint is not None:
        refuse_foreign(family, model.checkpoint.tensors, model.name)


def auto_class_of(config: Mapping[str, Any]) -> Any:
    """Return the Auto class of transformers that loads the language model of a config."""
    import transformers

    return getattr(transformers, auto_class_name(config))


def _has_class(config: Mapping[str, Any]) -> bool:
    """Tell whether the Auto class that loads a config's model has a class for its type."""
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    mapping: Any = auto_class_of(config)._model_mapping
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in mapping
