"""What a run starts from: where its models are, then the models, the tokenizer and the text, ready to train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from uptrain.checkpoint.output_folder import check_out
from uptrain.checkpoint.source import Source, resolve
from uptrain.data.block_reader import BlockReader
from uptrain.data.readers import build_tokens, open_reader
from uptrain.data.sources import TeacherText
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_text import TokenText
from uptrain.errors import UsageError
from uptrain.models.checks import check_heads
from uptrain.models.opened import open_model
from uptrain.training.accelerator import seed_process, shards
from uptrain.training.batches import Boundary
from uptrain.training.distillation import Objective
from uptrain.training.held_out import read_held_out
from uptrain.training.parallel import ParallelObjective
from uptrain.training.recipe import Recipe
from uptrain.training.run_folder import RunFolder
from uptrain.training.student import make_student
from uptrain.training.teacher import find_teacher, load_teacher
from uptrain.training.teacher_sampler import Sampler
from uptrain.training.teacher_text import generate_tokens
from uptrain.training.tokenizer import make_tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """All that a run needs and does not replace.

    - `recipe`: what the user asked for.
    - `accelerator`: this process's device, precision and connection to the other processes.
    - `model`: where the model to train was found; None for a new one.
    - `teacher`: where the teacher was found; None for a run without one.
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
    trusted = recipe.allow_pickle
    model = resolve(recipe.model, recipe.revision, trusted) if recipe.model else None
    teacher = find_teacher(recipe.distill.teacher, model, trusted) if recipe.distill else None
    opened = open_model(model) if model else None
    opened_teacher = open_model(teacher) if teacher else None
    check_heads(opened, opened_teacher)
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
    loaded = load_teacher(opened_teacher, recipe, accelerator) if opened_teacher else None
    objective = Objective(student, recipe.distill, loaded)
    del student, loaded
    if recipe.compile:
        objective.compile_bodies()

    def teacher_model() -> Any:
        # A teacher whose weights are divided between processes can't write text in one process alone.
        if objective.teacher is not None and not shard:
            return objective.teacher
        found = opened_teacher or open_model(find_teacher(None, model, trusted))
        return load_teacher(found, recipe, accelerator).to(accelerator.device)

    with closing(ParallelObjective(objective, accelerator, shard)) as parallel:
        encoder = TextEncoder(tokenizer)
        boundary = _boundary(recipe, encoder, parallel)
        reader = _make_reader(recipe, encoder, folder.tokens, accelerator, teacher_model)
        seed_process(recipe.seed, accelerator)
        yield TrainingSetup(
            recipe=recipe,
            accelerator=accelerator,
            model=model,
            teacher=teacher,
            tokenizer=tokenizer,
            dtype=dtype,
            objective=parallel,
            reader=reader,
            boundary=boundary,
            held_out=held_out,
            started=started,
        )


def _boundary(recipe: Recipe, encoder: TextEncoder, parallel: ParallelObjective) -> Boundary | None:
    """Return the token between documents that attention must not cross, or None where it may."""
    found = Boundary.of(encoder) if recipe.isolate_documents is not False else None
    if found is None or parallel.isolates_documents():
        return found
    if recipe.isolate_documents:
        raise UsageError("This model's class can't keep documents in a block apart.", "Leave out isolate_documents.")
    return None


def _make_reader(
    recipe: Recipe, encoder: TextEncoder, folder: Path, accelerator: Accelerator, teacher_model: Callable[[], Any]
) -> BlockReader:
    def write_teacher_text(source: TeacherText, into: Path) -> None:
        generate_tokens(Sampler(teacher_model(), encoder, source, recipe.block_size, recipe.seed), into)

    with accelerator.main_process_first():
        tokens = build_tokens(recipe.data, encoder, folder, accelerator.is_main_process, write_teacher_text)
    return open_reader(recipe.data, encoder, tokens, recipe.block_size, recipe.seed)
