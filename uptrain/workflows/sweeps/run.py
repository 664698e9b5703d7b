"""Convert one source to several targets by several methods, and measure all of them alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uptrain.architectures.model_class import check_language_model
from uptrain.architectures.wrappers import check_unwrapped
from uptrain.checkpoint.output_folder import check_out
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.source import Source, resolve
from uptrain.conversion.class_checks.weights import check_classes
from uptrain.conversion.plan.planner import make_plan
from uptrain.conversion.request import BUILTIN, CALIBRATION_TOKENS, Request
from uptrain.conversion.run.convert import MEMORY
from uptrain.errors import CheckpointError, UptrainError, UsageError
from uptrain.evaluation.sweep_results import RefusedTrial, Sweep, read_sweep, write_sweep
from uptrain.methods.registry import needs_text, text_options
from uptrain.publishing.page.style import drawing, png
from uptrain.publishing.page.sweep import pareto_chart
from uptrain.training import plots
from uptrain.workflows.sweeps.targets import parse_methods, parse_target
from uptrain.workflows.sweeps.trials import Measuring, PlannedTrial, Runner

__all__ = ["Measuring", "sweep"]

KEEP = ("all", "best", "none")
DEFAULT_METHODS = ("mean", "svd", "calibrated")
PICTURE = "pareto.png"


def sweep(
    model: str,
    to: Sequence[str],
    methods: Sequence[str] = DEFAULT_METHODS,
    out: str | Path | None = None,
    *,
    calibrate: str | None = None,
    calibration_tokens: int | None = None,
    repair_steps: int | None = None,
    measuring: Measuring | None = None,
    keep: str = "all",
    memory: int = MEMORY,
    revision: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
    on_layers: Callable[[], Callable[[int, int], None]] = lambda: lambda done, layers: None,
) -> tuple[Path, Sweep]:
    """Convert `model` to every target of `to` by every method, measure each, and return the folder and what was found.

    Targets are words: gqa:4, mqa, mla:128, mla:128+32 (rank and rotary dims) or mla:25%. `out` (default:
    ./NAME-sweep) gets a checkpoint folder for each, sweep.json and pareto.png. A sweep that was cut off goes on when
    it is repeated, and one that is repeated with more targets or methods adds them. `keep` says which checkpoints stay:
    all, the best (those on the Pareto front) or none. The source is measured once and its activations for calibration
    are computed once, each as far as `memory` bytes hold them. `on_layers` is asked for a callback as `convert`'s
    `on_layer` for each calibration.

    Raises:
        UsageError: a word that isn't known, nothing that can be made, or an `out` that holds something else.
        UptrainError: as `convert` and `evaluate`.
    """
    plots.check()
    if keep not in KEEP:
        raise UsageError(f"--keep {keep} is not known. Use {', '.join(KEEP)}.")
    calibration: dict[str, Any] = {
        "calibrate": calibrate,
        "calibration_tokens": calibration_tokens,
        "repair_steps": repair_steps,
    }
    asked = [parse_target(word) for word in dict.fromkeys(to)], parse_methods(methods)
    _check_calibration(calibration, asked[1])
    source = resolve(model, revision, allow_pickle)
    checkpoint = open_checkpoint(source.path, allow_pickle)
    check_unwrapped(checkpoint.config, source.name, "sweep")
    check_language_model(checkpoint.config, source.name)
    tasks: list[PlannedTrial] = []
    refused: list[RefusedTrial] = []
    errors: list[UptrainError] = []
    for target in asked[0]:
        for method in asked[1]:
            try:
                options = {**target.options, **(calibration if method == "calibrated" else {})}
                plan = make_plan(checkpoint, Request(method=method, **options), source.name)
                plan = replace(plan, notes=check_classes(checkpoint, plan, source.name))
            except (UsageError, CheckpointError) as error:
                refused.append(RefusedTrial(target.word, method, error.message))
                errors.append(error)
            else:
                tasks.append(PlannedTrial(f"{target.folder}-{method}", target.word, plan))
    if not tasks and errors and isinstance(errors[0], CheckpointError):
        raise errors[0]
    if not tasks:
        raise UsageError("Nothing of this can be made." if not refused else refused[0].why, "Ask for other targets.")
    how = measuring or Measuring()
    folder = Path(out) if out is not None else Path(f"{source.short_name}-sweep")
    named = {"name": source.name, "origin": source.origin, "revision": source.revision}
    used = {"calibrate": BUILTIN, "calibration_tokens": CALIBRATION_TOKENS}
    used |= {option: value for option, value in calibration.items() if value is not None}
    fresh = Sweep(named, {**how.to_dict(), "repair_steps": None, **used}, {}, {}, (), tuple(refused))
    found = _to_go_on_with(folder, source, fresh, tasks, overwrite)
    runner = Runner(source, checkpoint, folder, how, keep, memory, overwrite, on_note, on_layers)
    done = {trial.name for trial in found.trials}
    runner.check_measuring()
    runner.read_calibration([task for task in tasks if task.name not in done])
    _begin(folder, found)
    for number, task in enumerate(tasks, 1):
        where = f"[{number}/{len(tasks)}] {task.name}"
        if task.name in done:
            on_note(f"{where}: finished by an earlier run")
            continue
        found = runner.run(task, found, where)
    with drawing():
        (folder / PICTURE).write_bytes(png(pareto_chart(found)))
    return folder, found


def _check_calibration(given: dict[str, Any], methods: Sequence[str]) -> None:
    """Refuse what is said of calibration where nothing is calibrated."""
    for option, value in given.items():
        if value is not None and "calibrated" not in methods:
            named = f"--{option.replace('_', '-')}"
            raise UsageError(
                f"{named} is for the method calibrated, not {', '.join(methods)}.",
                f"Leave {named} out, or add calibrated to --methods.",
            )


def _to_go_on_with(folder: Path, source: Source, fresh: Sweep, tasks: Sequence[PlannedTrial], overwrite: bool) -> Sweep:
    """Return the sweep to go on with: what `folder` holds of the same one, else a fresh one.

    Raises:
        UsageError: the folder holds something else, or lies in the source.
    """
    check_out(folder, True, source.path)
    earlier = read_sweep(folder)
    if earlier is None and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists already and holds no sweep.", "Choose another --out.")
    if overwrite or (earlier is not None and not earlier.trials):
        earlier = None
    if earlier is not None:
        plans = {task.name: task.plan.digest for task in tasks}
        settings = _settings(earlier, fresh, tasks)
        changed = [name for name, value in settings.items() if earlier.settings.get(name) != value]
        if not _calibrated(earlier):
            changed = [name for name in changed if name not in text_options()]
        if earlier.source != fresh.source:
            changed = ["source"]
        elif not changed and any(plans.get(trial.name, trial.plan) != trial.plan for trial in earlier.trials):
            changed = ["source's files"]
        if changed:
            differences = ", ".join(_difference(key, earlier.settings, settings) for key in changed)
            raise UsageError(
                f"{folder} holds another sweep of {earlier.source.get('name')} (different {differences}).",
                "Choose another --out, or add --overwrite to start anew.",
            )
        earlier = replace(earlier, settings=settings)
    old = earlier.refused if earlier is not None else ()
    refused = tuple({(each.target, each.method): each for each in (*old, *fresh.refused)}.values())
    return replace(earlier or fresh, refused=refused)


def _calibrated(found: Sweep) -> bool:
    return any(needs_text(trial.method) for trial in found.trials)


def _settings(earlier: Sweep, fresh: Sweep, tasks: Sequence[PlannedTrial]) -> dict[str, Any]:
    """Return the settings of this run; where it calibrates nothing, what an earlier one said of calibration stays."""
    if any(task.plan.request.chosen_method.needs_text for task in tasks):
        return dict(fresh.settings)
    said = {name: earlier.settings[name] for name in text_options() if name in earlier.settings}
    return {**fresh.settings, **said}


def _difference(key: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    words = key.replace("_", " ")
    return f"{words}: {earlier.get(key)}, not {now[key]}" if key in now else words


def _begin(folder: Path, found: Sweep) -> None:
    """Write the sweep to go on with, and delete the trials of one that it replaces."""
    earlier = read_sweep(folder)
    going_on = {trial.name for trial in found.trials}
    for trial in earlier.trials if earlier is not None else ():
        if trial.name not in going_on:
            shutil.rmtree(folder / trial.name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_sweep(found, folder)
