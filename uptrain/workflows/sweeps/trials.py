"""Convert and measure one trial of a sweep after another."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uptrain.architectures.description import describe
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import EVALUATION, read_manifest
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.source import Source
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.run.convert import run_plan
from uptrain.conversion.run.options import RunOptions
from uptrain.conversion.run.prepare import Planned
from uptrain.data.sources import TextSource
from uptrain.data.token_text import read_tokens
from uptrain.errors import needing
from uptrain.evaluation.contexts import CONTEXT, check_stride, chosen_contexts
from uptrain.evaluation.reference import Reference
from uptrain.evaluation.run import HELD_OUT, Evaluation, evaluate, text_name, write_evaluation
from uptrain.evaluation.sweep_results import Sweep, Trial, write_sweep
from uptrain.formatting import size
from uptrain.models import loading

if TYPE_CHECKING:
    from uptrain.conversion.calibration.run import SharedCalibration


@dataclass(frozen=True)
class PlannedTrial:
    """A trial before it is run: its folder's name, the target as typed, and the plan."""

    name: str
    target: str
    plan: Plan


@dataclass(frozen=True)
class Measuring:
    """How every trial is measured, as `evaluate` takes it."""

    text: Sequence[TextSource] = (HELD_OUT,)
    context: int | None = None
    stride: int | None = None
    tokens: int = 32_768
    dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        context = CONTEXT if self.context is None else self.context
        return {**vars(self), "context": context, "text": [text_name(each) for each in self.text]}


class Runner:
    """Converts and measures trials one after another; what they share stays in memory."""

    def __init__(
        self, source: Source, checkpoint: Checkpoint, folder: Path, how: Measuring, keep: str, memory: int,
        overwrite: bool, on_note: Callable[[str], None], on_layers: Callable[[], Callable[[int, int], None]],
    ) -> None:  # fmt: skip
        self._source, self._checkpoint, self._folder = source, checkpoint, folder
        self._how, self._keep, self._memory, self._overwrite = how, keep, memory, overwrite
        self._note, self._on_layers = on_note, on_layers
        self._reference = Reference(source, memory)
        self._shared: SharedCalibration | None = None

    def check_measuring(self) -> None:
        """Read what trials will be measured on and how, so that what won't do is said before any trial is made.

        Raises:
            UsageError: it won't do.
        """
        how, model = self._how, describe(self._checkpoint.config, self._source.name)
        longest = model.value(model.family.keys.max_position_embeddings)
        longest = longest if isinstance(longest, int) else 2**31
        (context,) = chosen_contexts("--context", how.context, CONTEXT, longest, self._source.name, on_note=self._note)
        tokenizer = loading.load_tokenizer(self._source.path)
        most = max(len(read_tokens([each], tokenizer, how.tokens).ids) for each in how.text)
        check_stride(how.stride, min(context, most))

    def read_calibration(self, tasks: Sequence[PlannedTrial]) -> None:
        """Read the text that trials are calibrated on, so that one that won't do is said before any trial is made.

        Raises:
            UsageError: it won't do.
        """
        calibrated = [task for task in tasks if task.plan.request.chosen_method.needs_text]
        if calibrated:
            self._sharing().text(calibrated[0].plan)

    def run(self, task: PlannedTrial, found: Sweep, where: str) -> Sweep:
        """Run one trial and return the sweep with it, as it stands in sweep.json too."""
        place = self._folder / task.name
        converting = self._convert(task, place, where)
        began = time.monotonic()
        options = {name: value for name, value in vars(self._how).items() if name != "text"}
        evaluation = evaluate(str(place), self._reference, self._how.text, repeats=0, **options)
        write_evaluation(evaluation, place / EVALUATION)
        seconds = round(time.monotonic() - began, 1)
        found = _measured(found, evaluation).with_trial(_trial(task, evaluation, converting, seconds))
        found = self._tidied(found)
        write_sweep(found, self._folder)
        trial = next(trial for trial in found.trials if trial.name == task.name)
        self._note(
            f"{where}: {size(trial.cache_bytes_per_token)} a token, perplexity {trial.perplexity:.2f}, "
            f"KL {trial.kl:.4g}, {(converting or 0) + seconds:,.0f} s"
        )
        return found

    def _convert(self, task: PlannedTrial, place: Path, where: str) -> float | None:
        """Convert the trial into `place` and return the seconds it took, None if an earlier run did."""
        manifest = read_manifest(place)
        if manifest is not None and any(stage.get("plan") == task.plan.digest for stage in manifest["stages"][-1:]):
            return None
        self._note(f"{where}: converting")
        calibrated = task.plan.request.chosen_method.needs_text
        began = time.monotonic()
        options = RunOptions(
            diagnose=task.plan.latent is None,
            memory=self._memory + self._reference.nbytes if calibrated else None,
            shared=self._sharing() if calibrated else None,
        )
        planned = Planned(self._source, self._checkpoint, task.plan)
        events = Events(layer=self._on_layers(), note=self._note)
        run_plan(planned, place, overwrite=self._overwrite, options=options, events=events)
        return round(time.monotonic() - began, 1)

    def _sharing(self) -> SharedCalibration:
        if self._shared is None:
            with needing("The method calibrated"):
                from uptrain.conversion.calibration.run import SharedCalibration
            self._shared = SharedCalibration()
        return self._shared

    def _tidied(self, found: Sweep) -> Sweep:
        """Delete the checkpoints that aren't to stay; what is beaten once stays beaten."""
        trials = []
        for trial in found.trials:
            stays = self._keep == "all" or (self._keep == "best" and trial.pareto)
            if trial.kept and not stays:
                shutil.rmtree(self._folder / trial.name, ignore_errors=True)
            trials.append(replace(trial, kept=trial.kept and stays))
        return replace(found, trials=tuple(trials))


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


def _trial(task: PlannedTrial, found: Evaluation, converting: float | None, evaluating: float) -> Trial:
    assert found.baseline is not None
    names = (
        "perplexity_ratio", "perplexity_ratio_interval", "kl", "kl_interval", "top1_agreement", "top5_agreement",
        "flip_rate",
    )  # fmt: skip
    cache = found.model.cache_bytes_per_token
    return Trial(
        task.name, task.target, task.plan.request.method, cache, cache / found.baseline.cache_bytes_per_token,
        found.model.perplexity, **{name: getattr(found, name) for name in names}, convert_seconds=converting,
        evaluate_seconds=evaluating, pareto=False, kept=True, plan=task.plan.digest,
    )  # fmt: skip
