"""What a run logs while it trains: lines in train_log.jsonl, in the trackers, and progress events."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from uptrain.checkpoint.events import Events
from uptrain.models.peak_memory import memory_bytes
from uptrain.training.metrics import LossMetrics, TrainingStep
from uptrain.training.recipe import Recipe
from uptrain.training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one optimizer step gave.

    - `step`: its number, from 1.
    - `metrics`: its losses.
    - `learning_rate`: the rate that it used.
    - `grad_norm`: the norm of the gradient before it was clipped.
    - `skipped`: why the step was left out, or "".
    - `stop`: whether any process was asked to stop.
    - `seconds`: wall time.
    """

    step: int
    metrics: LossMetrics
    learning_rate: float
    grad_norm: float
    skipped: str
    stop: bool
    seconds: float


class Journal:
    """The losses since the last log line and the speed of the last 50 steps."""

    def __init__(self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator, events: Events) -> None:
        self.recipe, self.folder, self.accelerator, self.events = recipe, folder, accelerator, events
        self._window: list[dict[str, float]] = []
        self._seconds: deque[float] = deque(maxlen=50)

    def report(self, outcome: StepOutcome, held_out: LossMetrics | None) -> None:
        """Count a step, log it where a line is due, and send it to `events.step` in the first process."""
        recipe, metrics = self.recipe, outcome.metrics
        if not outcome.skipped:
            self._window.append(metrics.log())
            self._seconds.append(outcome.seconds)
        last = outcome.step == recipe.total_steps
        if outcome.step % recipe.log_every == 0 or held_out is not None or last or outcome.skipped:
            self._log(outcome, held_out)
        if self.accelerator.is_main_process:
            self.events.step(
                TrainingStep(
                    step=outcome.step,
                    steps=recipe.total_steps,
                    tokens=outcome.step * recipe.tokens_per_step,
                    loss=metrics.loss,
                    learning_rate=outcome.learning_rate,
                    grad_norm=outcome.grad_norm,
                    tokens_per_second=self.tokens_per_second,
                    seconds_left=self.seconds_per_step * (recipe.total_steps - outcome.step),
                    held_out_loss=None if held_out is None else held_out.cross_entropy,
                    divergence=metrics.divergence,
                    memory_bytes=memory_bytes(self.accelerator.device),
                    skipped=outcome.skipped,
                )
            )

    def _log(self, outcome: StepOutcome, held_out: LossMetrics | None) -> None:
        names = self._window[-1] if self._window else {}
        means = {name: round(sum(each[name] for each in self._window) / len(self._window), 5) for name in names}
        self._window = []
        entry = {
            "step": outcome.step,
            "tokens": outcome.step * self.recipe.tokens_per_step,
            **means,
            "lr": float(f"{outcome.learning_rate:.4g}"),
            "grad_norm": round(outcome.grad_norm, 4),
            "tokens_per_s": round(self.tokens_per_second),
            **(held_out.held_out_log() if held_out is not None else {}),
        }
        if self.accelerator.is_main_process:
            self.folder.record({**entry, **({"skipped": outcome.skipped} if outcome.skipped else {})})
        if self.recipe.trackers:
            self.accelerator.log(entry, step=outcome.step)

    @property
    def seconds_per_step(self) -> float:
        """Return the mean over the last 50 steps; infinity before the first."""
        return sum(self._seconds) / len(self._seconds) if self._seconds else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Return the speed over all processes."""
        return self.recipe.tokens_per_step / self.seconds_per_step

    def state_dict(self) -> dict[str, Any]:
        """Return the losses that the next log line depends on, as plain JSON values."""
        return {"window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._window = list(state["window"])
