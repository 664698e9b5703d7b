"""The learning rate over a run: linear warm-up, then one of five ways down."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from uptrain.training.recipe import Recipe


def make_schedule(optimizer: Optimizer, recipe: Recipe) -> Any:
    """Return the schedule that a recipe names; `wsd` stays level and falls as 1 − √t over its last `decay` share.

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
