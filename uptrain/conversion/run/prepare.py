"""Prepare a conversion: find and open the source, plan, and check what the classes need. Nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.remote import open_headers
from uptrain.checkpoint.sidecars import Sidecars, sidecars_of
from uptrain.checkpoint.source import Source, resolve
from uptrain.conversion.class_checks.weights import check_classes
from uptrain.conversion.plan.planner import Plan, make_plan
from uptrain.conversion.request import Request


class Planned(NamedTuple):
    """A planned conversion: the source, its open checkpoint and the plan."""

    source: Source
    checkpoint: Checkpoint
    plan: Plan


def plan_conversion(
    model: str,
    request: Request,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    dry: bool = False,
) -> Planned:
    """Find and open `model` and plan its conversion. Only headers and the config are read.

    - `model`: a folder, `demo` or a Hub id; a Hub model is downloaded first.
    - `request`: what to make of it.
    - `revision`: the Hub's branch, tag or commit.
    - `allow_pickle`: read `.bin` weights too, with torch's restricted unpickler.
    - `dry`: download only the headers of a Hub model; such a plan can't be run.

    Raises:
        UptrainError: the model can't be found or read, lacks weights, or the request is impossible for it.
    """
    if dry:
        source, checkpoint = open_headers(model, revision, allow_pickle)
    else:
        source = resolve(model, revision, allow_pickle)
        checkpoint = open_checkpoint(source.path, allow_pickle)
    plan = make_plan(checkpoint, request, source.name)
    return Planned(
        source, checkpoint, replace(plan, notes=(*plan.notes, *check_classes(checkpoint, plan, source.name)))
    )


def sidecars(source: Source, checkpoint: Checkpoint, dry: bool = False) -> Sidecars:
    """Return which files of `source` are copied into the result; with `dry`, they need not be downloaded yet.

    Raises:
        CheckpointError: one of them can't be read.
    """
    read = (*checkpoint.files, *filter(None, [checkpoint.index]))
    return sidecars_of(source.path, source.listed, read, dry=dry)


def default_out(source: Source, plan: Plan) -> Path:
    """Return `./NAME-gqa4`, `./NAME-mqa` or, by the cached values per token, `./NAME-mla576`."""
    return Path(f"{source.short_name}-{plan.attention.label}")
