"""Convert one source to several targets by several methods, and measure all trials in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from uptrain.architectures.model_class import check_language_model
from uptrain.architectures.wrappers import check_unwrapped
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.source import resolve
from uptrain.conversion.class_checks.weights import check_classes
from uptrain.conversion.plan.planner import make_plan
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UsageError
from uptrain.evaluation.sweep_results import RefusedTrial, Sweep
from uptrain.methods.registry import needs_text
from uptrain.publishing.page.style import drawing, png
from uptrain.publishing.page.sweep import pareto_chart
from uptrain.training import plots
from uptrain.workflows.sweeps.resume import begin, sweep_to_continue
from uptrain.workflows.sweeps.settings import SweepSettings
from uptrain.workflows.sweeps.targets import SweepTarget, parse_methods, parse_target
from uptrain.workflows.sweeps.trials import PlannedTrial, TrialRunner

PICTURE = "pareto.png"


def sweep(
    model: str,
    to: Sequence[str],
    settings: SweepSettings | None = None,
    *,
    out: str | Path | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    events: Events = Events(),
) -> tuple[Path, Sweep]:
    """Convert a model to every target by every method, measure each result, and return the folder and the results.

    The folder gets a checkpoint folder per trial, sweep.json and pareto.png. A sweep that was interrupted continues
    when it is repeated; repeated with more targets or methods, it adds them. The source is measured once, and its
    activations for calibration are computed once, both as far as `settings.memory` holds them.

    - `model`: a checkpoint folder, a Hub id, or `demo`.
    - `to`: targets: gqa:4, mqa, mla:128, mla:128+32 (rank and rotary dimensions) or mla:25% (share of the cache).
    - `settings`: methods, measurement and what to keep; None for the defaults.
    - `out`: the folder to write; None for ./NAME-sweep.
    - `revision`: branch, tag or commit of `model`, where it is a Hub id.
    - `allow_pickle`: also read .bin weights, with torch's restricted unpickler.
    - `overwrite`: replace another sweep in `out`.
    - `events`: `note` is called with sentences for the user; `layer` after each calibrated layer, and with 0 layers
      done when a calibration begins.

    Raises:
        UsageError: an unknown target or method, nothing that can be made, or an `out` that holds something else.
        UptrainError: as `convert` and `evaluate`.
    """
    settings = settings or SweepSettings()
    plots.check()
    settings.check_keep()
    targets = [parse_target(word) for word in dict.fromkeys(to)]
    settings = replace(settings, methods=tuple(parse_methods(settings.methods)))
    settings.check_calibration()
    source = resolve(model, revision, allow_pickle)
    checkpoint = open_checkpoint(source.path, allow_pickle)
    check_unwrapped(checkpoint.config, source.name, "sweep")
    check_language_model(checkpoint.config, source.name)
    planned, refused = _plan_trials(checkpoint, source.name, targets, settings)
    folder = Path(out) if out is not None else Path(f"{source.short_name}-sweep")
    fresh = Sweep(
        source={"name": source.name, "origin": source.origin, "revision": source.revision},
        settings=settings.to_dict(),
        measured={},
        original={},
        trials=(),
        refused=tuple(refused),
    )
    found = sweep_to_continue(folder, source, fresh, planned, overwrite)
    runner = TrialRunner(source, checkpoint, folder, settings, overwrite, events)
    done = {trial.name for trial in found.trials}
    runner.check_measurement()
    runner.read_calibration([trial for trial in planned if trial.name not in done])
    begin(folder, found)
    for number, trial in enumerate(planned, 1):
        progress = f"[{number}/{len(planned)}] {trial.name}"
        if trial.name in done:
            events.note(f"{progress}: finished by an earlier run")
            continue
        found = runner.run(trial, found, progress)
    with drawing():
        (folder / PICTURE).write_bytes(png(pareto_chart(found)))
    return folder, found


def _plan_trials(
    checkpoint: Checkpoint, name: str, targets: Sequence[SweepTarget], settings: SweepSettings
) -> tuple[list[PlannedTrial], list[RefusedTrial]]:
    """Return the trials that can be made, and those that can't.

    Raises:
        UsageError: none can be made.
        CheckpointError: none can be made, since the checkpoint is broken.
    """
    planned: list[PlannedTrial] = []
    refused: list[RefusedTrial] = []
    errors: list[UsageError | CheckpointError] = []
    for target in targets:
        for method in settings.methods:
            try:
                options = {**target.options, **(settings.calibration if needs_text(method) else {})}
                plan = make_plan(checkpoint, Request(method=method, **options), name)
                plan = replace(plan, notes=check_classes(checkpoint, plan, name))
            except (UsageError, CheckpointError) as error:
                refused.append(RefusedTrial(target=target.word, method=method, why=error.message))
                errors.append(error)
            else:
                planned.append(PlannedTrial(name=f"{target.folder}-{method}", target=target.word, plan=plan))
    if planned:
        return planned, refused
    if errors and isinstance(errors[0], CheckpointError):
        raise errors[0]
    raise UsageError(errors[0].message if errors else "Nothing of this can be made.", "Ask for other targets.")
