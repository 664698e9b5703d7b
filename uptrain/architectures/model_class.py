"""The purpose of a checkpoint's class, read from its name: a language model, a classifier, an embedding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from uptrain.errors import UsageError

_LANGUAGE = re.compile(r"CausalLM|LMHead|DoubleHeads|ConditionalGeneration")
_LANGUAGE_ENDING = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")

AUTO_CLASSES: Mapping[str, str] = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}
"""The Auto class of transformers that loads a class, by the ending of the class's name."""


def class_named(config: Mapping[str, Any]) -> str | None:
    """Return the first class in a config's `architectures`, None where there is none."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) and first else None


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Tell whether a config's class has a language-model head; a config that names no class counts as one."""
    named = class_named(config)
    return named is None or bool(_LANGUAGE.search(named))


def auto_class_without_head(config: Mapping[str, Any]) -> str:
    """Return the Auto class of transformers that loads a checkpoint without a language-model head."""
    named = class_named(config) or ""
    return next((auto for ending, auto in AUTO_CLASSES.items() if named.endswith(ending)), "AutoModel")


def check_language_model(config: Mapping[str, Any], name: str) -> None:
    """Refuse a checkpoint without a language-model head; `name` is what the user called it.

    Raises:
        UsageError: its class has no such head.
    """
    if is_language_model(config):
        return
    raise UsageError(
        f"{name} is a {class_named(config)}, which has no language-model head (lm_head), so there is nothing that "
        "predicts tokens.",
        "Only language models can be evaluated, trained and loaded here; convert works for this one too. If it is a "
        "language model after all, name its class in `architectures` of config.json.",
    )


def stem(class_name: str) -> str:
    """Return how the names of a family's classes begin: "Llama" for LlamaForCausalLM."""
    return _LANGUAGE_ENDING.sub("", class_name)
