"""The model that a run trains: loaded or new, checked, and frozen where the recipe says so."""

from __future__ import annotations

from typing import Any

import torch

from uptrain.data.sources import TeacherText
from uptrain.errors import UsageError
from uptrain.models import loading, neutral_norm
from uptrain.models.checks import check_reads_text, longest_context
from uptrain.models.opened import OpenedModel
from uptrain.models.precision import dtype_named
from uptrain.training.recipe import Recipe
from uptrain.training.scope import select_trainable


def make_student(recipe: Recipe, source: OpenedModel | None, tokenizer: Any) -> tuple[Any, torch.dtype]:
    """Return the model to train, frozen where the recipe says so, and the dtype of the stored result.

    Raises:
        UsageError: blocks are longer than its context, the dtype can't hold its weights, or
            the recipe trains weights that the model does not have.
    """
    if source is None:
        assert recipe.config is not None
        model = loading.new_model(recipe.config, tokenizer, recipe.seed)
        dtype = dtype_named(recipe.dtype) or torch.bfloat16
    else:
        model = loading.load_model(source, attn_implementation=recipe.attn_implementation)
        dtype = dtype_named(recipe.dtype) or model.dtype
        check_reads_text(model, source.name, "train", "Train it with transformers' Seq2SeqTrainer.")
        if model.config.is_encoder_decoder and any(isinstance(each, TeacherText) for each in recipe.data):
            raise UsageError(
                f"{source.name} has an encoder, and a teacher of its kind can't write text from nothing.",
                "Name text instead of `source: teacher`.",
            )
    longest = longest_context(model)
    for name in ("block_size", "held_out_block_size"):
        size = getattr(recipe, name)
        if longest is not None and size is not None and size > longest:
            raise UsageError(
                f"{name} {size} is longer than the model's {longest} positions.", f"Set {name}={longest} or less."
            )
    if neutral_norm.unfold(model):
        neutral_norm.check_dtype(dtype)
    torch.manual_seed(recipe.seed)
    model = select_trainable(model.train(), recipe)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, dtype
