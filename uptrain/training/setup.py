"""What a run starts from: where its models are, then the models, the tokenizer and the text, ready to train."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from uptrain.architectures.quantization import check_trainable
from uptrain.checkpoint.output_folder import check_out
from uptrain.checkpoint.source import Source, resolve
from uptrain.data.block_reader import BlockReader
from uptrain.data.boundary import Boundary
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_text import TokenText
from uptrain.models.checks import check_heads
from uptrain.models.opened import open_model
from uptrain.training.accelerator import seed_process, shards
from uptrain.training.blocks import make_reader
from uptrain.training.distillation import Objective
from uptrain.training.held_out import read_held_out
from uptrain.training.parallel import ParallelObjective
from uptrain.training.recipe import Recipe
from uptrain.training.run_folder import RunFolder
from uptrain.training.student import make_student
from uptrain.training.teacher import find_teacher, load_teacher
from uptrain.training.tokenizer import make_tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """All that a run needs and does not replace.

    - `recipe`: what the user asked for.
    - `accelerator`: this process's device, precision and connection to the other processes.
    - `model`: where the model to train was found; None for a new one.
    - `teacher`: where the teacher that the student learns from was found; None for a run without one.
    - `tokenizer`: the model's tokenizer.
    - `dtype`: the dtype in which the result is stored.
    - `objective`: student, teacher and loss, on their devices.
    - `reader`: the blocks to train on.
    - `boundary`: the token between documents that attention must not cross; None where it may.
    - `held_out`: the text to score; None where the recipe names none.
    - `started`: `time.monotonic()` when the run began.
    """

    recipe: Recipe
    accelerator: Accelerator
    model: Source | None
    teacher: Source | None
    tokenizer: Any
    dtype: torch.dtype
    objective: ParallelObjective
    reader: BlockReader
    boundary: Boundary | None
    held_out: TokenText | None
    started: float


@contextmanager
def prepared(recipe: Recipe, accelerator: Accelerator, folder: RunFolder, restart: bool) -> Iterator[TrainingSetup]:
    """Find and load what a recipe names, open its run folder, and free the models' memory at the end of the block.

    - `recipe`: what to prepare.
    - `accelerator`: as `make_accelerator` returned it.
    - `folder`: the run's own folder, which this opens.
    - `restart`: delete an unfinished run of that folder.

    Raises:
        UsageError: the recipe names what is not there or does not fit together, or its output is in use.
    """
    model = resolve(recipe.model, recipe.revision, recipe.allow_pickle) if recipe.model else None
    teacher = find_teacher(recipe, model)
    opened = open_model(model) if model else None
    opened_teacher = open_model(teacher) if teacher else None
    check_heads(opened, opened_teacher)
    if opened is not None:
        check_trainable(opened.quantization, opened.name)
    shard = shards(recipe, accelerator)
    # A block under `main_process_first` runs in the first process, then in all others.
    with accelerator.main_process_first():
        check_out(recipe.output, recipe.overwrite, model.path if model else None)
        if accelerator.is_main_process:
            folder.open(recipe, restart)
    started = time.monotonic()
    tokenizer = make_tokenizer(recipe, model, folder.tokenizer, accelerator)
    held_out = read_held_out(recipe, tokenizer)
    student, dtype = make_student(recipe, opened, tokenizer)
    loaded = load_teacher(opened_teacher, recipe, accelerator) if opened_teacher and recipe.distill else None
    objective = Objective(student, recipe.distill, loaded)
    del student, loaded
    if recipe.compile:
        objective.compile_bodies()

    def teacher_model() -> Any:
        # A teacher whose weights are divided between processes can't write text in one process alone.
        if objective.teacher is not None and not shard:
            return objective.teacher
        assert opened_teacher is not None
        return load_teacher(opened_teacher, recipe, accelerator).to(accelerator.device)

    with closing(ParallelObjective(objective, accelerator, shard)) as parallel:
        encoder = TextEncoder(tokenizer)
        boundary = parallel.boundary(encoder, recipe.isolate_documents)
        reader = make_reader(recipe, encoder, folder.tokens, accelerator, teacher_model)
        seed_process(recipe.seed, accelerator)
        yield TrainingSetup(
            recipe=recipe,
            accelerator=accelerator,
            model=model,
            teacher=teacher if recipe.distill else None,
            tokenizer=tokenizer,
            dtype=dtype,
            objective=parallel,
            reader=reader,
            boundary=boundary,
            held_out=held_out,
            started=started,
        )
