"""Refuse models that a command can't use: before they are loaded where a config says so, else right after."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.model_class import check_language_model
from uptrain.architectures.wrappers import check_unwrapped
from uptrain.errors import UsageError
from uptrain.models.opened import OpenedModel


def check_heads(*models: OpenedModel | None) -> None:
    """Refuse models that can't be run as language models, before anything is loaded or written. None is skipped.

    Raises:
        UsageError: a model has no language-model head, or is a wrapper around one that has.
    """
    for model in models:
        if model is not None:
            check_unwrapped(model.config, model.name, "evaluate or train")
            check_language_model(model.config, model.name)


def check_reads_text(model: Any, name: str, command: str, hint: str = "") -> None:
    """Refuse a model that reads something other than token ids.

    - `model`: the loaded model.
    - `name`: what the user called it.
    - `command`: the command that has nothing but text.
    - `hint`: what the user can do instead.

    Raises:
        UsageError: its main input is not `input_ids`.
    """
    if model.main_input_name != "input_ids":
        raise UsageError(
            f"{name} reads {model.main_input_name}, not text, and text is all that {command} can give it.", hint
        )


def check_tokens(model: Any, ids: NDArray[np.integer[Any]]) -> None:
    """Refuse token ids (any shape, integers) for which a model has no embedding.

    Raises:
        UsageError: the largest id is beyond the embedding.
    """
    table, largest = model.get_input_embeddings().num_embeddings, int(ids.max(initial=0))
    if largest >= table:
        raise UsageError(
            f"The tokenizer gives token {largest}, but the model has {table} embeddings.",
            "Use the tokenizer that the model was trained with, or resize the model's embeddings.",
        )


def longest_context(model: Any) -> int | None:
    """Return how many positions a model has, None where its config names no number. Each family has its own key."""
    entry = FAMILIES.get(model.config.model_type)
    key = entry.keys.max_position_embeddings if entry else "max_position_embeddings"
    value = getattr(model.config, key, None)
    return value if isinstance(value, int) else None
