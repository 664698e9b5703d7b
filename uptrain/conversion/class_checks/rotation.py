"""Before a conversion: is the rotation that the plan counts on the one that transformers' own classes compute?"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from uptrain.architectures.rope import InverseFrequencies
from uptrain.architectures.rope_parameters import EVERY
from uptrain.checkpoint.manifest import versions
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.plan.planner import Plan
from uptrain.errors import CheckpointError
from uptrain.models import child_process
from uptrain.models.rotary_tables import Table, answers

_SECONDS = 600
_NEAR = 1e-5
"""How far two frequencies may be apart, relatively: the classes compute in float32."""


def check_rotation(checkpoint: Checkpoint, plan: Plan, name: str) -> None:
    """Refuse a plan whose rotation is another than transformers' own classes make of the two configs.

    Only plans that write a rotation, or take the heads' rotated dims apart, are asked about, and only where torch and
    transformers 5 are installed; a latent's own table is asked about once it is chosen.

    Raises:
        CheckpointError: it is another, or a class can't read it.
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
            "frequencies than uptrain reads.",
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


def _ask(configs: list[dict[str, Any]], *, here: bool) -> list[dict[str, Table] | str]:
    """Return each config's tables or why there are none; in a child process, unless this one needs torch anyway."""
    if here or "transformers" in sys.modules:
        return answers(configs)
    try:
        done = child_process.ask("uptrain.models.rotary_tables", text=json.dumps(configs), seconds=_SECONDS)
        found = json.loads(done.stdout) if done.returncode == 0 else [{} for _ in configs]
    except (OSError, subprocess.SubprocessError, ValueError):
        found = [{} for _ in configs]  # torch or transformers is broken here, and pooling needs neither
    return [each if isinstance(each, str) else {kind: Table(**table) for kind, table in each.items()} for each in found]
