"""Write the result's other files: config.json, the index, our modelling code, and the source's files that go along."""

from __future__ import annotations

import shutil
from pathlib import Path

from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.jsonfile import dump_json
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.sidecars import Sidecars, copy_sidecars, reading_code
from uptrain.checkpoint.weight_files import INDEX
from uptrain.conversion.plan.planner import Plan
from uptrain.models.target import REMOTE_CODE


def write_companions(checkpoint: Checkpoint, plan: Plan, sidecars: Sidecars, folder: Path) -> None:
    """Write all files of the result but its shards and its manifest.

    - `checkpoint`: the open source.
    - `plan`: what is made of it.
    - `sidecars`: the source's files that go along.
    - `folder`: where the result is written, OUT.partial.
    """
    copy_sidecars(checkpoint.path, sidecars, folder)
    for name in plan.target.code_files:
        shutil.copyfile(REMOTE_CODE / name, folder / name)
    whole = plan.whole_config
    code = {**reading_code(checkpoint.config), **whole.get("auto_map", {})}
    config = {**whole, "auto_map": code} if code else whole
    write_atomic(folder / "config.json", dump_json(config, allow_nan=True))
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": plan.weight_map()}
        write_atomic(folder / INDEX, dump_json(index))
