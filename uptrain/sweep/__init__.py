"""Convert one source to several targets by several methods, and measure all of them alike."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uptrain import plots
from uptrain.checkpoint.manifest import EVALUATION, read_manifest
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.source import Source, resolve
from uptrain.convert import MEMORY, run_plan
from uptrain.errors import UsageError
from uptrain.evaluate import HELD_OUT, Evaluation, evaluate, text_name, write_evaluation
from uptrain.measure.reference import Reference
from uptrain.page.style import drawing, png
from uptrain.page.sweep import pareto_chart
from uptrain.plan import Plan, make_plan
from uptrain.recipe_schema import DataSource
from uptrain.request import Request
from uptrain.sweep.targets import parse_methods, parse_target
from uptrain.sweep_file import Arm, Refused, Sweep, read_sweep, write_sweep
from uptrain.words import size

if TYPE_CHECKING:
    from uptrain.calibration import SharedCalibration

KEEP = ("all", "best", "none")
METHODS = ("mean", "svd", "calibrated")
PICTURE = "pareto.png"


@dataclass(frozen=True)
class Task:
    """An arm before it is run: its folder's name, the target as typed, and the plan."""

    name: str
    target: str
    plan: Plan


@dataclass(frozen=True)
class Measuring:
    """How every arm is measured, as `evaluate` takes it."""

    text: Sequence[DataSource] = (HELD_OUT,)
    context: int = 1024
    stride: int | None = None
    tokens: int = 32_768
    dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "text": [text_name(each) for each in self.text]}


def sweep(
    model: str,
    to: Sequence[str],
    methods: Sequence[str] = METHODS,
    out: str | Path | None = None,
    *,
    calibrate: str = "builtin",
    calibration_tokens: int = 65_536,
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
    source = resolve(model, revision, allow_pickle)
    checkpoint = open_checkpoint(source.path, allow_pickle)
    tasks: list[Task] = []
    refused: list[Refused] = []
    for target in asked[0]:
        for method in asked[1]:
            try:
                options = {**target.options, **(calibration if method == "calibrated" else {})}
                plan = make_plan(checkpoint, Request(method=method, **options), source.name)
            except UsageError as error:
                refused.append(Refused(target.word, method, error.message))
            else:
                tasks.append(Task(f"{target.folder}-{method}", target.word, plan))
    if not tasks:
        raise UsageError("Nothing of this can be made." if not refused else refused[0].why, "Ask for other targets.")
    how = measuring or Measuring()
    folder = Path(out) if out is not None else Path(f"{source.short_name}-sweep")
    named = {"name": source.name, "origin": source.origin, "revision": source.revision}
    fresh = Sweep(named, {**how.to_dict(), **calibration}, {}, {}, (), tuple(refused))
    found = _begun(folder, fresh, tasks, overwrite)
    runner = _Runner(source, checkpoint, folder, how, keep, memory, overwrite, on_note, on_layers)
    done = {arm.name for arm in found.arms}
    for number, task in enumerate(tasks, 1):
        where = f"[{number}/{len(tasks)}] {task.name}"
        if task.name in done:
            on_note(f"{where}: finished by an earlier run")
            continue
        found = runner.run(task, found, where)
    with drawing():
        (folder / PICTURE).write_bytes(png(pareto_chart(found)))
    return folder, found


def _begun(folder: Path, fresh: Sweep, tasks: Sequence[Task], overwrite: bool) -> Sweep:
    """Return the sweep to go on with: what `folder` holds of the same one, else a fresh one.

    Raises:
        UsageError: the folder holds something else.
    """
    earlier = read_sweep(folder)
    if earlier is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and holds no sweep.", "Choose another --out.")
    if earlier is not None and overwrite:
        for arm in earlier.arms:
            shutil.rmtree(folder / arm.name, ignore_errors=True)
        earlier = None
    if earlier is not None:
        plans = {task.name: task.plan.digest for task in tasks}
        changed = [name for name, value in fresh.settings.items() if earlier.settings.get(name) != value]
        if earlier.source != fresh.source:
            changed = ["source"]
        elif not changed and any(plans.get(arm.name, arm.plan) != arm.plan for arm in earlier.arms):
            changed = ["source's files"]
        if changed:
            raise UsageError(
                f"{folder} holds another sweep (different {changed[0].replace('_', ' ')}).",
                "Choose another --out, or add --overwrite to start anew.",
            )
    old = earlier.refused if earlier is not None else ()
    refused = tuple({(each.target, each.method): each for each in (*old, *fresh.refused)}.values())
    found = replace(earlier or fresh, refused=refused)
    folder.mkdir(parents=True, exist_ok=True)
    write_sweep(found, folder)
    return found


class _Runner:
    """Converts and measures arms one after another; what they share stays in memory."""

    def __init__(
        self, source: Source, checkpoint: Checkpoint, folder: Path, how: Measuring, keep: str, memory: int,
        overwrite: bool, on_note: Callable[[str], None], on_layers: Callable[[], Callable[[int, int], None]],
    ) -> None:  # fmt: skip
        self._source, self._checkpoint, self._folder = source, checkpoint, folder
        self._how, self._keep, self._memory, self._overwrite = how, keep, memory, overwrite
        self._note, self._on_layers = on_note, on_layers
        self._reference = Reference(source, memory)
        self._shared: SharedCalibration | None = None

    def run(self, task: Task, found: Sweep, where: str) -> Sweep:
        """Run one arm and return the sweep with it, as it stands in sweep.json too."""
        place = self._folder / task.name
        converting = self._convert(task, place, where)
        began = time.monotonic()
        options = {name: value for name, value in vars(self._how).items() if name != "text"}
        evaluation = evaluate(str(place), self._reference, self._how.text, repeats=0, **options)
        write_evaluation(evaluation, place / EVALUATION)
        seconds = round(time.monotonic() - began, 1)
        found = _measured(found, evaluation).with_arm(_arm(task, evaluation, converting, seconds))
        found = self._tidied(found)
        write_sweep(found, self._folder)
        arm = next(arm for arm in found.arms if arm.name == task.name)
        self._note(
            f"{where}: {size(arm.cache_bytes_per_token)} a token, perplexity {arm.perplexity:.2f}, KL {arm.kl:.4g}, "
            f"{(converting or 0) + seconds:,.0f} s"
        )
        return found

    def _convert(self, task: Task, place: Path, where: str) -> float | None:
        """Convert the arm into `place` and return the seconds it took, None if an earlier run did."""
        manifest = read_manifest(place)
        if manifest is not None and any(stage.get("plan") == task.plan.digest for stage in manifest["stages"][-1:]):
            return None
        self._note(f"{where}: converting")
        calibrated = task.plan.request.method == "calibrated"
        began = time.monotonic()
        run_plan(
            self._source, self._checkpoint, task.plan, place, overwrite=self._overwrite, memory=self._memory,
            on_layer=self._on_layers(), on_note=self._note, shared=self._sharing() if calibrated else None,
        )  # fmt: skip
        return round(time.monotonic() - began, 1)

    def _sharing(self) -> SharedCalibration | None:
        if self._shared is None:
            try:
                from uptrain.calibration import SharedCalibration
            except ImportError:
                return None  # the conversion says what to install
            self._shared = SharedCalibration(self._memory)
        return self._shared

    def _tidied(self, found: Sweep) -> Sweep:
        """Delete the checkpoints that aren't to stay; what is beaten once stays beaten."""
        arms = []
        for arm in found.arms:
            stays = self._keep == "all" or (self._keep == "best" and arm.pareto)
            if arm.kept and not stays:
                shutil.rmtree(self._folder / arm.name, ignore_errors=True)
            arms.append(replace(arm, kept=arm.kept and stays))
        return replace(found, arms=tuple(arms))


def _measured(found: Sweep, evaluation: Evaluation) -> Sweep:
    """Put what every evaluation of the sweep shares into it."""
    assert evaluation.baseline is not None
    names = ("tokens", "windows", "context", "stride", "dtype", "device")
    original = ("perplexity", "bits_per_byte", "cache_bytes_per_token")
    return replace(
        found,
        measured={name: getattr(evaluation, name) for name in names},
        original={name: getattr(evaluation.baseline, name) for name in original},
    )


def _arm(task: Task, found: Evaluation, converting: float | None, evaluating: float) -> Arm:
    assert found.baseline is not None
    names = (
        "perplexity_ratio", "perplexity_ratio_interval", "kl", "kl_interval", "top1_agreement", "top5_agreement",
        "flip_rate",
    )  # fmt: skip
    cache = found.model.cache_bytes_per_token
    return Arm(
        task.name, task.target, task.plan.request.method, cache, cache / found.baseline.cache_bytes_per_token,
        found.model.perplexity, **{name: getattr(found, name) for name in names}, convert_seconds=converting,
        evaluate_seconds=evaluating, pareto=False, kept=True, plan=task.plan.digest,
    )  # fmt: skip
