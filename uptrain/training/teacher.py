"""The teacher of a run: the checkpoint that the student was converted from, found in its history."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from uptrain.checkpoint.folder_digest import changed_file
from uptrain.checkpoint.manifest import converted_from
from uptrain.checkpoint.source import Source, resolve
from uptrain.data.sources import TeacherText
from uptrain.errors import UptrainError, UsageError
from uptrain.models import devices, loading, neutral_norm
from uptrain.models.opened import OpenedModel
from uptrain.training.recipe import Recipe


def find_teacher(recipe: Recipe, student: Source | None) -> Source | None:
    """Return the checkpoint of the teacher: the named one, or the source of the student's conversion.

    `student` is the checkpoint to train, None for a new model. The result is None where the recipe neither learns from
    a teacher nor lets one write text. The recipe's allow_pickle holds for the teacher too; a name in uptrain.json gives
    no permission, because anybody may have written it.

    Raises:
        UsageError: no teacher is known, or the conversion's source does not exist any more or has other weights.
    """
    if recipe.distill is None and not any(isinstance(each, TeacherText) for each in recipe.data):
        return None
    if recipe.distill is not None and recipe.distill.teacher is not None:
        return resolve(recipe.distill.teacher, None, recipe.allow_pickle)
    converted = converted_from(student.path) if student else None
    if converted is None:
        raise UsageError(
            f"{student.name if student else 'The model'} has no uptrain.json that says what it was converted from.",
            "Name the original with distill.teacher=MODEL, or learn from the text alone with distill=null.",
        )
    try:
        found = resolve(str(converted["name"]), converted.get("revision"), recipe.allow_pickle)
    except UptrainError as error:
        raise UsageError(
            f"The teacher {converted['name']}, from which {student.name if student else 'it'} was converted, "
            f"can't be found: {error.message}",
            "Name its present place with distill.teacher=MODEL.",
        ) from None
    # The folder may have changed, or a relative name may mean another folder. The first process checks for all.
    changed = changed_file(found.path, converted) if found.origin == "folder" and not devices.rank() else ""
    if changed:
        raise UsageError(
            f"The teacher {converted['name']} is not what {student.name if student else 'the model'} was converted "
            f"from: {found.path / changed} differs.",
            "Name the present place of the original with distill.teacher=MODEL.",
        )
    return found


def load_teacher(source: OpenedModel, recipe: Recipe, accelerator: Accelerator) -> Any:
    """Load a teacher, frozen, in bfloat16 where the run computes in bfloat16 and in fp32 elsewhere."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    model = loading.load_model(source, dtype, recipe.attn_implementation)
    neutral_norm.check_loaded(model)
    return model.requires_grad_(False).eval()
