"""The blocks that a run trains on: the recipe's data, tokenised once, with the text that a teacher writes for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from uptrain.data.block_reader import BlockReader
from uptrain.data.readers import build_tokens, open_reader
from uptrain.data.sources import TeacherText
from uptrain.data.text_encoder import TextEncoder
from uptrain.training.recipe import Recipe
from uptrain.training.teacher_sampler import Sampler
from uptrain.training.teacher_text import generate_tokens


def make_reader(
    recipe: Recipe, encoder: TextEncoder, folder: Path, accelerator: Accelerator, teacher_model: Callable[[], Any]
) -> BlockReader:
    """Tokenise a recipe's data and return the reader of its blocks.

    - `recipe`: names the data.
    - `encoder`: the tokenizer of the model.
    - `folder`: the run's own folder for tokens.
    - `accelerator`: lets the first process write the tokens and the others read them.
    - `teacher_model`: returns the teacher that writes text; called only where the recipe asks for such text.

    Raises:
        UsageError: a source can't be read, or has less than one block of text.
    """

    def write_teacher_text(source: TeacherText, into: Path) -> None:
        sampler = Sampler(teacher_model(), encoder, source, recipe.block_size, recipe.seed)
        generate_tokens(sampler, into)

    with accelerator.main_process_first():
        tokens = build_tokens(recipe.data, encoder, folder, accelerator.is_main_process, write_teacher_text)
    return open_reader(recipe.data, encoder, tokens, recipe.block_size, recipe.seed)
