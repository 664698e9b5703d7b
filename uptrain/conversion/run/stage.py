"""Describe a conversion as a stage of uptrain.json, the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uptrain.checkpoint.checksum import checksum_file
from uptrain.checkpoint.manifest import read_manifest
from uptrain.checkpoint.progress import State
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.run.job import Job

Energy = dict[int, dict[str, dict[str, float]]]
"""By layer and method, the share of key and of value energy that the method explains, or would explain."""


def stage_of(job: Job, plan: Plan, state: State) -> dict[str, Any]:
    """Return the stage of uptrain.json that describes a finished conversion.

    - `job`: what was run.
    - `plan`: its plan as it was run, with the rotary pairs that were chosen.
    - `state`: what was finished and measured.
    """
    measured = {"energy_kept": energy_of(state), "head_similarity": by_layer(state.similarity)}
    if state.orders:
        measured["head_order"] = by_layer(state.orders)
    return {
        "stage": "convert",
        "source": _source(job, state.sources),
        "request": plan.request.recorded(plan.before != plan.after),
        "num_attention_heads": plan.after[0].num_attention_heads,
        "num_key_value_heads": {
            "before": plan.before[0].num_key_value_heads,
            "after": plan.after[0].num_key_value_heads,
        },
        **plan.attention.recorded,
        "cache_bytes_per_token": {"before": plan.cache_before, "after": plan.cache_after},
        "host": {"model_type": plan.holder, "remote_code": bool(plan.target.remote_code)},
        "plan": plan.digest,
        **measured,
    }


def energy_of(state: State) -> Energy:
    """Return the explained energy that was measured of each layer."""
    return by_layer(state.layers)


def energy_in(folder: Path) -> Energy:
    """Return the explained energy that the manifest of a finished conversion holds; empty where it has none."""
    stages = (read_manifest(folder) or {"stages": [{}]})["stages"]
    return by_layer(stages[-1].get("energy_kept", {}))


def by_layer(notes: dict[str, Any]) -> dict[int, Any]:
    """Return what was measured of each layer, ordered by the layer's number."""
    return {int(layer): found for layer, found in sorted(notes.items(), key=lambda item: int(item[0]))}


def _source(job: Job, read: dict[str, str]) -> dict[str, Any]:
    """Describe the source; `read` has the checksums of its weight files."""
    checkpoint, source = job.checkpoint, job.source
    # An index that was not read, such as one next to a single weight file, is no part of the source.
    wanted = (*job.sidecars.copied, "config.json", *filter(None, [checkpoint.index]))
    others = [name for name in wanted if (checkpoint.path / name).is_file()]
    files = {name: read[name] for name in checkpoint.files}
    files |= {name: checksum_file(checkpoint.path / name) for name in others}
    return {
        "name": source.name,
        "origin": source.origin,
        "revision": source.revision,
        "model_type": str(checkpoint.config["model_type"]),
        "files": dict(sorted(files.items())),
    }
