"""Continue the sweep that a folder holds, or begin a fresh one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uptrain.checkpoint.output_folder import check_out
from uptrain.checkpoint.source import Source
from uptrain.errors import UsageError
from uptrain.evaluation.sweep_results import Sweep, read_sweep, write_sweep
from uptrain.methods.registry import needs_text, text_options
from uptrain.workflows.sweeps.trials import PlannedTrial


def sweep_to_continue(
    folder: Path, source: Source, fresh: Sweep, planned: Sequence[PlannedTrial], overwrite: bool
) -> Sweep:
    """Return the sweep that the folder holds, with the settings of this run; the fresh one where it holds none.

    - `folder`: where the sweep is written.
    - `source`: the model that is converted.
    - `fresh`: this run's sweep, without trials.
    - `planned`: the trials of this run.
    - `overwrite`: begin a fresh sweep whatever the folder holds.

    Raises:
        UsageError: the folder holds something else, or lies in the source.
    """
    check_out(folder, True, source.path)
    earlier = read_sweep(folder)
    if earlier is None and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists already and holds no sweep.", "Choose another --out.")
    if overwrite or earlier is None or not earlier.trials:
        return fresh
    settings = _settings(earlier, fresh, planned)
    changed = _changes(earlier, replace(fresh, settings=settings), planned)
    if changed:
        differences = ", ".join(_difference(key, earlier.settings, settings) for key in changed)
        raise UsageError(
            f"{folder} holds another sweep of {earlier.source.get('name')} (different {differences}).",
            "Choose another --out, or add --overwrite to start again.",
        )
    refused = {(each.target, each.method): each for each in (*earlier.refused, *fresh.refused)}
    return replace(earlier, settings=settings, refused=tuple(refused.values()))


def begin(folder: Path, found: Sweep) -> None:
    """Write the sweep that is continued, and delete the checkpoints of a sweep that it replaces."""
    earlier = read_sweep(folder)
    continued = {trial.name for trial in found.trials}
    for trial in earlier.trials if earlier is not None else ():
        if trial.name not in continued:
            shutil.rmtree(folder / trial.name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_sweep(found, folder)


def _changes(earlier: Sweep, now: Sweep, planned: Sequence[PlannedTrial]) -> list[str]:
    """Return the names of what makes two sweeps different ones; empty where the earlier one can be continued."""
    if earlier.source != now.source:
        return ["source"]
    changed = [name for name, value in now.settings.items() if earlier.settings.get(name) != value]
    if not any(needs_text(trial.method) for trial in earlier.trials):
        changed = [name for name in changed if name not in text_options()]
    plans = {trial.name: trial.plan.digest for trial in planned}
    if not changed and any(plans.get(trial.name, trial.plan) != trial.plan for trial in earlier.trials):
        return ["source's files or version of uptrain"]
    return changed


def _settings(earlier: Sweep, fresh: Sweep, planned: Sequence[PlannedTrial]) -> dict[str, Any]:
    """Return the settings of this run; where it calibrates nothing, with the calibration of the earlier run."""
    if any(trial.needs_text for trial in planned):
        return dict(fresh.settings)
    calibration = {name: earlier.settings[name] for name in text_options() if name in earlier.settings}
    return {**fresh.settings, **calibration}


def _difference(key: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    words = key.replace("_", " ")
    return f"{words}: {earlier.get(key)}, not {now[key]}" if key in now else words
