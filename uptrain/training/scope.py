"""Which weights of a model train: all, attention alone, or low-rank adapters."""

from __future__ import annotations

import re
from typing import Any

from uptrain.architectures.decoders import FAMILIES
from uptrain.errors import UsageError, needing
from uptrain.training.recipe import Recipe


def is_attention(model_type: str, name: str) -> bool:
    """Return whether a parameter or module belongs to an attention layer, by its name and the model's family.

    Raises:
        UsageError: the family is not in the table.
    """
    entry = FAMILIES.get(model_type)
    if entry is None:
        raise UsageError(
            f"The attention weights of a {model_type} model are not known.",
            "Leave out train: attention, attention_learning_rate and lora, or name lora.target_modules.",
        )
    pattern = "|".join(re.escape(each.removeprefix("{prefix}")) for each in entry.attentions)
    pattern = pattern.replace(re.escape("{layer}"), r"\d+")
    return re.search(rf"(^|\.)({pattern})", name) is not None


def select_trainable(model: Any, recipe: Recipe) -> Any:
    """Freeze the weights that the recipe does not train. Return the model, inside a peft model for adapters.

    Raises:
        UsageError: the family is not known, or peft is not installed.
    """
    kind = model.config.model_type
    if recipe.train == "attention":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_attention(kind, name))
    if recipe.lora is None:
        return model
    with needing("lora"):
        import peft
    lora = recipe.lora
    targets = lora.target_modules or [
        name for name, module in model.named_modules() if hasattr(module, "weight") and module.weight.ndim == 2
        and is_attention(kind, name)
    ]  # fmt: skip
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora.target_modules name nothing in this model: {error}") from None
