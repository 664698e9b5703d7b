"""Lay out what training and recipes found; printing itself is the console's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.checkpoint.manifest import converted_from
from uptrain.cli import console
from uptrain.formatting import typed

if TYPE_CHECKING:
    from uptrain.training.recipe import Recipe
    from uptrain.training.trainer import Training


def training(done: Training, recipe: Recipe, as_json: bool) -> None:
    """Show a finished run and what to type next."""
    if as_json:
        console.result_json(done.to_dict())
        return
    pairs = [("trained", f"{done.steps:,} steps, {done.tokens:,} tokens on {done.num_processes} process(es)")]
    if not done.isolated and recipe.isolate_documents is None:
        pairs.append(("documents", "end to end in a block: this model's class can't keep them apart"))
    if done.resumed_from:
        pairs.append(("resumed", f"from step {done.resumed_from:,}"))
    if done.teacher:
        pairs.append(("teacher", done.teacher))
    pairs.append(("loss", f"{done.loss:.4f} nats per token at the last step ({done.precision})"))
    if done.skipped:
        pairs.append(("left out", f"{done.skipped} step(s) whose loss was bad; train_log.jsonl names them"))
    if done.held_out_loss is not None:
        words = f"{done.held_out_loss:.4f} nats per token, perplexity {math.exp(done.held_out_loss):.2f}"
        best = "" if done.best_step is None else f"; the model of step {done.best_step:,}, the best"
        pairs.append(("held out", f"{words}, {done.bits_per_byte:.3f} bits per byte{best}"))
    pairs.append(("time", f"{done.seconds:,.0f} s"))
    console.facts(f"Wrote {done.out}", pairs)
    source = converted_from(done.out)
    original = str(source["name"]) if source else recipe.model
    trusted = " --allow-pickle" if recipe.allow_pickle else ""
    console.note(
        f"Next: uptrain eval {typed(done.out)}" + (f" --baseline {typed(original)}{trusted}" if original else "")
    )


def recipe_list(paths: dict[str, Path], summaries: dict[str, str]) -> None:
    """Show the shipped recipes."""
    console.facts("", [(name, summaries[name]) for name in paths])
