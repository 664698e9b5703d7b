"""Convert and measure the trials of a sweep one after another."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.architectures.description import describe
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import EVALUATION, read_manifest
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.source import Source
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.run.convert import run_plan
from uptrain.conversion.run.options import RunOptions
from uptrain.conversion.run.prepare import Planned
from uptrain.data.token_text import read_tokens
from uptrain.errors import needing
from uptrain.evaluation import evaluate
from uptrain.evaluation.contexts import CONTEXT, PositionLimit, check_stride, choose_contexts
from uptrain.evaluation.reference import Reference
from uptrain.evaluation.result import Evaluation, write_evaluation
from uptrain.evaluation.settings import listed
from uptrain.evaluation.sweep_results import Sweep, Trial, write_sweep
from uptrain.formatting import size
from uptrain.models import loading
from uptrain.workflows.sweeps.settings import SweepSettings

if TYPE_CHECKING:
    from uptrain.conversion.calibration.text import SharedCalibration

_UNLIMITED = 2**31
_OF_EVALUATION = (
    "perplexity_ratio", "perplexity_ratio_interval", "kl", "kl_interval", "top1_agreement", "top5_agreement",
    "flip_rate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A trial before it runs: its folder's name, the target as the user wrote it, and the plan."""

    name: str
    target: str
    plan: Plan

    @property
    def needs_text(self) -> bool:
        """Tell whether the trial's method reads a calibration text."""
        return self.plan.request.chosen_method.needs_text


class TrialRunner:
    """Converts and measures trials one after another; what they share stays in memory.

    - `source`, `checkpoint`: the model that is converted.
    - `folder`: where the sweep is written.
    - `settings`: how to convert and measure.
    - `overwrite`: replace a trial's folder that holds something else.
    - `events`: as `sweep` describes them.
    """

    def __init__(
        self, source: Source, checkpoint: Checkpoint, folder: Path, settings: SweepSettings, overwrite: bool,
        events: Events,
    ) -> None:  # fmt: skip
        self._source, self._checkpoint, self._folder = source, checkpoint, folder
        self._settings, self._overwrite, self._events = settings, overwrite, events
        self._reference = Reference(source, settings.memory)
        self._shared: SharedCalibration | None = None

    def check_measurement(self) -> None:
        """Read the texts and check the sizes of the measurement, so that a wrong one is refused before any trial.

        Raises:
            UsageError: a text or a size is wrong.
        """
        settings, name = self._settings, self._source.name
        description = describe(self._checkpoint.config, name)
        positions = description.value(description.family.keys.max_position_embeddings)
        limit = PositionLimit(positions=positions if isinstance(positions, int) else _UNLIMITED, name=name)
        (context,) = choose_contexts("--context", listed(settings.context), CONTEXT, limit, self._events.note)
        tokenizer = loading.load_tokenizer(self._source.path)
        longest_text = max(len(read_tokens([text], tokenizer, settings.tokens).ids) for text in settings.text)
        check_stride(settings.stride, min(context, longest_text))

    def read_calibration(self, trials: Sequence[PlannedTrial]) -> None:
        """Read the text of the calibrated trials, so that a wrong one is refused before any trial.

        Raises:
            UsageError: the text is wrong.
        """
        calibrated = [trial for trial in trials if trial.needs_text]
        if calibrated:
            self._sharing().text(calibrated[0].plan)

    def run(self, planned: PlannedTrial, found: Sweep, progress: str) -> Sweep:
        """Run one trial, add it to sweep.json, and return the sweep with it; `progress` begins each note."""
        folder = self._folder / planned.name
        convert_seconds = self._convert(planned, folder, progress)
        began = time.monotonic()
        evaluation = evaluate(str(folder), self._settings.evaluation, baseline=self._reference)
        write_evaluation(evaluation, folder / EVALUATION)
        seconds = round(time.monotonic() - began, 1)
        found = _measured(found, evaluation).with_trial(_trial(planned, evaluation, convert_seconds, seconds))
        found = self._tidied(found)
        write_sweep(found, self._folder)
        trial = next(trial for trial in found.trials if trial.name == planned.name)
        self._events.note(
            f"{progress}: {size(trial.cache_bytes_per_token)} per token, perplexity {trial.perplexity:.2f}, "
            f"KL {trial.kl:.4g}, {(convert_seconds or 0) + seconds:,.0f} s"
        )
        return found

    def _convert(self, planned: PlannedTrial, folder: Path, progress: str) -> float | None:
        """Convert a trial into its folder and return the seconds; None where an earlier run converted it."""
        plan = planned.plan
        manifest = read_manifest(folder)
        if manifest is not None and any(stage.get("plan") == plan.digest for stage in manifest["stages"][-1:]):
            return None
        self._events.note(f"{progress}: converting")
        if planned.needs_text:
            self._events.layer(0, len(plan.before))
        began = time.monotonic()
        options = RunOptions(
            diagnose=not plan.request.kind.latent,
            memory=self._settings.memory + self._reference.nbytes if planned.needs_text else None,
            shared=self._sharing() if planned.needs_text else None,
        )
        conversion = Planned(self._source, self._checkpoint, plan)
        events = Events(layer=self._events.layer, note=self._events.note)
        run_plan(conversion, folder, overwrite=self._overwrite, options=options, events=events)
        return round(time.monotonic() - began, 1)

    def _sharing(self) -> SharedCalibration:
        if self._shared is None:
            with needing("The method calibrated"):
                from uptrain.conversion.calibration.text import SharedCalibration
            self._shared = SharedCalibration()
        return self._shared

    def _tidied(self, found: Sweep) -> Sweep:
        """Delete the checkpoints that are not to be kept; a trial that is beaten once stays beaten."""
        trials = []
        for trial in found.trials:
            keep = self._settings.keep == "all" or (self._settings.keep == "best" and trial.pareto)
            if trial.kept and not keep:
                shutil.rmtree(self._folder / trial.name, ignore_errors=True)
            trials.append(replace(trial, kept=trial.kept and keep))
        return replace(found, trials=tuple(trials))


def _measured(found: Sweep, evaluation: Evaluation) -> Sweep:
    """Return the sweep with what all its evaluations have in common."""
    assert evaluation.baseline is not None
    names = ("tokens", "windows", "context", "stride", "dtype", "device")
    original = ("perplexity", "bits_per_byte", "cache_bytes_per_token")
    return replace(
        found,
        measured={name: getattr(evaluation, name) for name in names},
        original={name: getattr(evaluation.baseline, name) for name in original},
    )


def _trial(
    planned: PlannedTrial, evaluation: Evaluation, convert_seconds: float | None, evaluate_seconds: float
) -> Trial:
    """Return a finished trial; `Sweep.with_trial` decides whether it is on the Pareto front."""
    assert evaluation.baseline is not None
    cache = evaluation.model.cache_bytes_per_token
    return Trial(
        name=planned.name,
        target=planned.target,
        method=planned.plan.request.method,
        cache_bytes_per_token=cache,
        share=cache / evaluation.baseline.cache_bytes_per_token,
        perplexity=evaluation.model.perplexity,
        **{name: getattr(evaluation, name) for name in _OF_EVALUATION},
        convert_seconds=convert_seconds,
        evaluate_seconds=evaluate_seconds,
        pareto=False,
        kept=True,
        plan=planned.plan.digest,
    )
