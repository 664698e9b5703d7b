"""What of a model trains, and with which learning rate: all, attention alone, or low-rank adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from uptrain.architectures.decoders import FAMILIES
from uptrain.errors import UsageError, needing
from uptrain.training.recipe import Recipe


def is_attention(model_type: str, name: str) -> bool:
    """Tell whether a parameter or module of a family's model belongs to an attention layer.

    Raises:
        UsageError: the family is not in the table.
    """
    entry = FAMILIES.get(model_type)
    if entry is None:
        raise UsageError(
            f"Which weights of a {model_type} model are its attention is not known.",
            "Leave out train: attention, attention_learning_rate and lora, or name lora.target_modules.",
        )
    pattern = "|".join(re.escape(each.removeprefix("{prefix}")) for each in entry.attentions)
    pattern = pattern.replace(re.escape("{layer}"), r"\d+")
    return re.search(rf"(^|\.)({pattern})", name) is not None


def select_trainable(model: Any, recipe: Recipe) -> Any:
    """Freeze what the recipe doesn't train and return the model, inside peft's where it asks for adapters.

    Raises:
        UsageError: an unknown family, or peft is not installed.
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


def make_optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW over what trains; matrices and embeddings decay, norms and biases don't.

    Raises:
        UsageError: the 8-bit optimizer is asked for and bitsandbytes is not installed.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    raised = recipe.attention_learning_rate
    if raised is None:
        groups = _by_decay((p for _, p in trained), recipe.learning_rate, recipe.weight_decay)
    else:
        kind = model.config.model_type if hasattr(model, "config") else model.student.config.model_type
        inside = {name for name, _ in trained if is_attention(kind, name)}
        groups = _by_decay((p for name, p in trained if name in inside), raised, recipe.weight_decay)
        groups += _by_decay((p for name, p in trained if name not in inside), recipe.learning_rate, recipe.weight_decay)
    if recipe.optimizer == "adamw-8bit":
        with needing("optimizer: adamw-8bit"):
            import bitsandbytes
        found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=recipe.betas)
        return found
    return torch.optim.AdamW(groups, betas=recipe.betas, fused=True)


def _by_decay(parameters: Iterable[nn.Parameter], rate: float, decay: float) -> list[dict[str, Any]]:
    listed = list(parameters)
    groups = [
        {"params": [p for p in listed if p.ndim > 1], "lr": rate, "weight_decay": decay},
        {"params": [p for p in listed if p.ndim <= 1], "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
