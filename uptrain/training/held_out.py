"""Held-out text: how well a model predicts text that it is not trained on."""

from __future__ import annotations

from typing import Any

import torch

from uptrain.data.token_text import TokenText, read_tokens
from uptrain.errors import UsageError
from uptrain.training.metrics import LossMetrics
from uptrain.training.parallel import ParallelObjective
from uptrain.training.recipe import Recipe


def read_held_out(recipe: Recipe, tokenizer: Any) -> TokenText | None:
    """Return the tokens of a recipe's held-out text, or None where it names none.

    Raises:
        UsageError: the text is shorter than a block.
    """
    if not recipe.held_out:
        return None
    text = read_tokens(recipe.held_out, tokenizer, recipe.held_out_tokens)
    if len(text.ids) < recipe.scored_block_size:
        raise UsageError(f"held_out has only {len(text.ids)} tokens, less than one block.", "Name more text.")
    return text


def score(objective: ParallelObjective, text: TokenText, recipe: Recipe) -> LossMetrics:
    """Return the losses of the held-out text; all processes must call this, and each scores a part of it."""
    accelerator, block = objective.accelerator, recipe.scored_block_size
    # Documents follow each other as they do in `uptrain eval`, so that the metrics compare.
    batch = objective.batch(text.ids[: len(text.ids) // block * block].reshape(-1, block), None)
    rows = -(-len(batch.ids) // accelerator.num_processes)
    # As many tokens at once as a micro-batch has.
    micro = accelerator.num_processes * recipe.gradient_accumulation
    size = max(1, recipe.tokens_per_step // (micro * block))
    sums = torch.zeros(4, device=accelerator.device)
    with objective.evaluating():
        for number in range(-(-rows // size)):
            begin = (accelerator.process_index * rows) + number * size
            end = min(begin + size, (accelerator.process_index + 1) * rows, len(batch.ids))
            # Under FSDP, all processes must run equally often. One without sequences runs the first and drops its sum.
            part = batch.rows(slice(begin, end)) if begin < end else batch.rows(slice(0, 1))
            found = objective.losses(part)
            sums += found if begin < end else 0
    return objective.metrics(accelerator.reduce(sums, reduction="sum"), batch.target_tokens)
