"""The optimizer of a run and its learning rate: linear warm-up, then one of five schedules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from uptrain.errors import check_installed, needing
from uptrain.training.recipe import Recipe
from uptrain.training.scope import is_attention

BITSANDBYTES = "optimizer: adamw-8bit"
"""What needs bitsandbytes, as a recipe spells it."""


def check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer whose package is missing, before a run prepares its text.

    Raises:
        UsageError: the recipe names the 8-bit optimizer, and bitsandbytes is not installed.
    """
    if recipe.optimizer == "adamw-8bit":
        check_installed("bitsandbytes", BITSANDBYTES)


def make_optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW over the weights that train; matrices and embeddings have weight decay, norms and biases have none.

    Raises:
        UsageError: the recipe names the 8-bit optimizer, and bitsandbytes is not installed.
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
        with needing(BITSANDBYTES):
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


def make_schedule(optimizer: Optimizer, recipe: Recipe) -> Any:
    """Return the schedule that a recipe names. `wsd` is constant, then falls as 1 − √t in the last `decay` of a run.

    Source: Hu et al. 2024, "MiniCPM", section 4 (WSD); Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations", section 3 (1 − √t).
    """
    total, warmup = recipe.total_steps, recipe.warmup_steps
    if recipe.schedule == "cosine":
        return get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr_rate=recipe.min_lr_ratio)
    if recipe.schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup)
    falling = total - warmup
    if recipe.schedule == "wsd":
        falling = min(falling, max(1, round(recipe.decay * total)))
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=max(1, falling),
        num_stable_steps=total - warmup - falling,
        decay_type="linear" if recipe.schedule == "linear" else "1-sqrt",
        min_lr_ratio=recipe.min_lr_ratio,
    )
