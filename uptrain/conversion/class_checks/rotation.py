"""Check that the rotation a plan counts on is the one that transformers' own classes compute."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from uptrain.architectures.rope import InverseFrequencies
from uptrain.architectures.rope_parameters import EVERY
from uptrain.checkpoint.manifest import versions
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.class_checks.answers import SECONDS, AnswerFormat, find_answers
from uptrain.conversion.plan.planner import Plan
from uptrain.errors import CheckpointError
from uptrain.models import child_process
from uptrain.models.rotary_tables import Table, answers

Answer = dict[str, Table] | str
"""A config's rotary tables by layer type, none where this transformers doesn't know the class; or why it can't say."""
_NEAR = 1e-5
"""How far two frequencies may be apart, relatively: the classes compute in float32."""


def check_rotation(checkpoint: Checkpoint, plan: Plan, name: str) -> None:
    """Refuse a plan whose rotation differs from the one that transformers' classes compute of the two configs.

    Classes are asked only about plans that write a rotation or mix rotated dims, and only where torch and transformers
    5 are installed. They are asked about a latent's own table once it is chosen.

    Raises:
        CheckpointError: the rotation differs, or a class can't read the config.
    """
    writes, mixes = plan.attention.writes_rotation, plan.request.chosen_method.mixes_dims
    moves = plan.before != plan.after and mixes and any(spec.rotary_ndims != 0 for spec in plan.before)
    if not plan.source.family.position.rotates or not (writes or moves) or not _installed():
        return
    chosen = not plan.attention.chooses_rope_pairs
    configs = [plan.source.config, *([plan.config] if writes and chosen else [])]
    tables = _ask(configs, here=plan.request.needs_torch)
    for config, found in zip(configs, tables, strict=True):
        if isinstance(found, str):
            raise CheckpointError(
                f"{_class(config)} of transformers can't read the rotary parameters of {name}: {found}.",
                "Correct its config.json.",
            )
    source, *results = (found for found in tables if not isinstance(found, str))
    if not all(found for found in (source, *results)):
        return  # this transformers doesn't know the class
    if not _as_planned(plan, source, results):
        raise CheckpointError(
            f"{name} has rotary parameters of which {_class(plan.source.config)} and {_class(plan.config)} make other "
            "inverse frequencies than uptrain reads.",
            "Report it with its config.json; nothing was converted.",
        )


def _as_planned(plan: Plan, source: Mapping[str, Table], results: Sequence[Mapping[str, Table]]) -> bool:
    if not plan.attention.writes_rotation:
        dims = {2 * len(table.short) for table in source.values()}
        rotated = {spec.rotary_ndims or spec.head_dim for spec in plan.before if spec.rotary_ndims != 0}
        return rotated <= dims
    was = wanted = source[EVERY]
    planned = plan.attention.rotation
    if planned is not None:
        if not _same(was, _table(planned.source)):
            return False
        wanted = _table(planned.result)
    return all(_same(found[EVERY], wanted) for found in results)


def _table(planned: InverseFrequencies) -> Table:
    return Table(planned.values, planned.values, planned.attention_factor)


def _same(found: Table, wanted: Table) -> bool:
    pairs = ((found.short, wanted.short), (found.long, wanted.long), ((found.factor,), (wanted.factor,)))
    return all(
        len(one) == len(other) and all(abs(a - b) <= _NEAR * abs(b) for a, b in zip(one, other, strict=True))
        for one, other in pairs
    )


def _class(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [config.get("model_type")])[0])


def _installed() -> bool:
    major = versions().get("transformers", "").partition(".")[0]
    return major.isdecimal() and int(major) >= 5 and importlib.util.find_spec("torch") is not None


def _ask(configs: list[dict[str, Any]], *, here: bool) -> list[Answer]:
    """Return each config's tables or why there are none; in a child process, unless this one needs torch anyway."""
    here = here or "transformers" in sys.modules
    texts = [json.dumps({"rotation": config}, sort_keys=True) for config in configs]
    return find_answers(texts, TABLES, lambda: answers(configs) if here else _asked_in_child(configs), alone=not here)


def _asked_in_child(configs: list[dict[str, Any]]) -> list[Answer]:
    with suppress(OSError, subprocess.SubprocessError, ValueError, TypeError):
        done = child_process.ask("uptrain.models.rotary_tables", text=json.dumps(configs), seconds=SECONDS)
        if done.returncode == 0:
            return [_tables(each) if isinstance(each, dict) and each else each for each in json.loads(done.stdout)]
    return [{} for _ in configs]  # torch or transformers is broken here, and pooling needs neither


def _tables(found: Any) -> dict[str, Table]:
    """Return tables from their JSON values.

    Raises:
        KeyError, TypeError: it is something else.
    """
    if not isinstance(found, dict) or not found:
        raise TypeError("no tables by layer type")
    return {kind: Table(tuple(table["short"]), tuple(table["long"]), table["factor"]) for kind, table in found.items()}


def _stored(found: Answer) -> dict[str, Any] | None:
    """Return the JSON values of tables; None for a class that is not known, or that can't read a config."""
    return None if isinstance(found, str) or not found else {kind: asdict(table) for kind, table in found.items()}


TABLES: AnswerFormat[Answer] = AnswerFormat(write=_stored, read=_tables)
"""Only tables are stored: whatever else a class answers may be another next time."""
