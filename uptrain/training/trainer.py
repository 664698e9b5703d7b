"""The training loop: steps, evaluations and checkpoints, from where the run folder says the run is."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from uptrain.checkpoint.events import Events
from uptrain.errors import CheckpointError, Interrupted
from uptrain.training import state
from uptrain.training.export import write_best
from uptrain.training.held_out import score
from uptrain.training.journal import Journal, StepOutcome
from uptrain.training.loss_guard import LossGuard
from uptrain.training.metrics import LossMetrics
from uptrain.training.optimizer import make_optimizer, make_schedule
from uptrain.training.run_folder import RunFolder
from uptrain.training.setup import TrainingSetup
from uptrain.training.stop_signal import StopRequest


class Trainer:
    """A run: its setup, and what changes from step to step.

    - `done`: the number of finished steps.
    - `resumed_from`: the step at which this call began.
    - `last`: the losses of the last step, or None before the first.
    - `best`: the lowest held-out loss so far and its step, or None.
    """

    def __init__(self, setup: TrainingSetup, folder: RunFolder, events: Events) -> None:
        self.setup, self.folder = setup, folder
        self.optimizer = make_optimizer(setup.objective.objective, setup.recipe)
        self.schedule = make_schedule(self.optimizer, setup.recipe)
        self.guard = LossGuard(setup.recipe)
        self.journal = Journal(setup.recipe, folder, setup.accelerator, events)
        self.stop = StopRequest()
        self.done = 0
        self.resumed_from = 0
        self.last: LossMetrics | None = None
        self.best: tuple[float, int] | None = None

    def run(self) -> LossMetrics | None:
        """Resume and train to the recipe's last step; return the losses of the held-out text, None without one.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the run is saved.
            UptrainError: a step is unusable, or a checkpoint can't be read or written.
        """
        setup, recipe = self.setup, self.setup.recipe
        self._resume()
        setup.accelerator.init_trackers("uptrain", recipe.to_dict() if recipe.trackers else None)
        with self.stop.listening():
            while self.done < recipe.total_steps:
                outcome = self.step()
                last = self.done == recipe.total_steps
                self.journal.report(outcome, None if last else self._evaluate())
                if outcome.stop or (self.done % recipe.save_every == 0 and not last):
                    self._save()
                if outcome.stop:
                    raise Interrupted(
                        f"Interrupted at step {self.done} of {recipe.total_steps}; the run is saved in "
                        f"{self.folder.path}.",
                        "Run the same command to go on.",
                    )
        return None if setup.held_out is None else score(setup.objective, setup.held_out, recipe)

    def step(self) -> StepOutcome:
        """Take one optimizer step on the next batch; all processes call this.

        Raises:
            UptrainError: its loss is unusable, and the recipe does not skip such steps.
        """
        setup, recipe, accelerator = self.setup, self.setup.recipe, self.setup.accelerator
        started = time.monotonic()
        learning_rate = float(self.schedule.get_last_lr()[0])
        batch = setup.objective.batch(setup.reader.take(recipe.batch_size), setup.boundary)
        # Every process has the tokens of the whole batch, so each knows the divisor of the sum.
        tokens, processes = batch.target_tokens, accelerator.num_processes
        micro = batch.share(accelerator.process_index, processes, recipe.gradient_accumulation)
        sums = torch.zeros(5, device=accelerator.device)
        for position, part in enumerate(micro):
            with setup.objective.micro_batch(position == len(micro) - 1):
                found = setup.objective.losses(part)
                # accelerate averages the gradients of processes, hence the factor.
                accelerator.backward(found[0] * (processes / max(1, tokens)))
            sums[:4] += found.detach()
        norm = setup.objective.clip(recipe.max_grad_norm)
        # One small exchange per step: the losses, and whether any process was asked to stop, so that all stop together.
        sums[4] = float(self.stop.requested)
        sums = accelerator.reduce(sums, reduction="sum")
        self.last = setup.objective.metrics(sums[:4], tokens)
        skipped = self.guard.check(self.done + 1, self.last.loss, norm)
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.done += 1
        return StepOutcome(
            step=self.done,
            metrics=self.last,
            learning_rate=learning_rate,
            grad_norm=norm,
            skipped=skipped,
            stop=bool(sums[4] > 0),
            seconds=time.monotonic() - started,
        )

    def close(self) -> None:
        """Free the optimizer's memory."""
        self.optimizer.param_groups.clear()
        self.optimizer.state.clear()

    def _evaluate(self) -> LossMetrics | None:
        """Score the held-out text where an evaluation is due, and keep the model if it is the best so far."""
        setup, every = self.setup, self.setup.recipe.steps_between_evaluations
        if setup.held_out is None or every is None or self.done % every:
            return None
        found = score(setup.objective, setup.held_out, setup.recipe)
        if self.best is None or found.cross_entropy < self.best[0]:
            self.best = (found.cross_entropy, self.done)
            write_best(setup, self.folder)
        return found

    def _save(self) -> None:
        setup = self.setup
        schedule = {key: value for key, value in self.schedule.state_dict().items() if key != "lr_lambdas"}
        values = {
            "step": self.done,
            "reader": setup.reader.state_dict(),
            "journal": {**self.journal.state_dict(), **self.guard.state_dict()},
            "last": asdict(self.last) if self.last else None,
            "best": self.best,
            "schedule": {**schedule, "lr_lambdas": [None] * len(self.schedule.lr_lambdas)},
        }
        self.folder.save(
            self.done,
            values,
            lambda partial: state.save(partial, setup.objective.module, self.optimizer, setup.accelerator),
            setup.accelerator,
        )

    def _resume(self) -> None:
        setup, found = self.setup, self.folder.newest()
        if found is None:
            with setup.accelerator.main_process_first():
                self.folder.rewind_log(0)
            return
        path, saved = found
        state.load(path, setup.objective.module, self.optimizer, setup.accelerator)
        try:
            self._restore(saved)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / 'state.json'} is not the state of a run: {error!r}.", "Start again with --restart."
            ) from None
        if setup.accelerator.is_main_process:
            self.folder.rewind_log(self.done)
        setup.accelerator.wait_for_everyone()

    def _restore(self, saved: dict[str, Any]) -> None:
        self.schedule.load_state_dict(saved["schedule"])
        self.setup.reader.load_state_dict(saved["reader"])
        self.journal.load_state_dict(saved["journal"])
        self.guard.load_state_dict(saved["journal"])
        self.done = self.resumed_from = int(saved["step"])
        self.last = LossMetrics(**saved["last"]) if saved["last"] else None
        self.best = tuple(saved["best"]) if saved["best"] else None
