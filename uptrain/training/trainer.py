"""Train a checkpoint, or a new model, on text: one loop for one process or many, exact to resume."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import append_stage
from uptrain.checkpoint.output_folder import check_out, staged_output
from uptrain.checkpoint.source import Source, resolve
from uptrain.data.block_reader import BlockReader, Tokens
from uptrain.data.readers import build_tokens, counts_of, open_reader
from uptrain.data.sources import TeacherText
from uptrain.errors import Interrupted, UptrainError, UsageError
from uptrain.models import devices, loading
from uptrain.models.peak_memory import memory_bytes
from uptrain.training import export, plots, state
from uptrain.training.accelerator import LOWER, make_accelerator, on_stop_signal, precision_of, seed_own, shards
from uptrain.training.batches import Batch, Boundary, batch_of
from uptrain.training.distillation import Objective
from uptrain.training.journal import Journal
from uptrain.training.launch import decided, together
from uptrain.training.metrics import LossMetrics, TrainingResult, TrainingStep
from uptrain.training.parallel import ParallelObjective
from uptrain.training.recipe import Recipe
from uptrain.training.run_folder import RunFolder
from uptrain.training.schedules import make_schedule
from uptrain.training.scope import make_optimizer
from uptrain.training.setup import make_model, make_tokenizer, read_held_out
from uptrain.training.teacher import find_teacher, load_teacher
from uptrain.training.teacher_text import generate_tokens

_SKIPS = 10
"""Steps left out in a row before a run stops: something is wrong that skipping won't cure."""


def train(
    recipe: Recipe, *, restart: bool = False, plot: bool = False, events: Events = Events()
) -> TrainingResult | None:
    """Run a recipe and write the result to its `output`. A run that was interrupted is resumed at its last checkpoint.

    Under torchrun or accelerate launch, every process calls this. `devices.using` says on which device to train.

    - `recipe`: what to train, on what, for how long.
    - `restart`: delete an unfinished run of the same output instead of resuming it.
    - `plot`: draw the log to training.png in the output folder.
    - `events`: `step` receives a `TrainingStep` after each optimizer step, in the first process.

    Returns the result in the first process and None in the others.

    Raises:
        UsageError: the recipe can't be carried out.
        Interrupted: Ctrl-C or SIGTERM; the run is saved.
        UptrainError: a loss that is no number, a checkpoint that can't be written, full memory, or a lost process.
    """
    loading.quiet()
    if plot:
        plots.check()
    with decided(), together(), devices.enough_memory("Training", LOWER):
        run = _Run(recipe, events, plot)
        try:
            with run.folder:
                return run.run(restart)
        finally:
            run.close()


class _Run:
    def __init__(self, recipe: Recipe, events: Events, plot: bool) -> None:
        self.recipe, self.events, self.plot = recipe, events, plot
        self.folder = RunFolder(recipe.output)
        self.accelerator = make_accelerator(recipe)
        self.journal = Journal(recipe)
        self.step = 0
        self.resumed_from = 0
        self.last: LossMetrics | None = None
        self.best: tuple[float, int] | None = None
        self.skips = 0
        self.stop = False
        share = self.accelerator.num_processes * recipe.gradient_accumulation
        if recipe.batch_size % share:
            raise UsageError(
                f"batch_size {recipe.batch_size} counts a whole step's sequences, so it must be a multiple of "
                f"{self.accelerator.num_processes} process(es) × gradient_accumulation {recipe.gradient_accumulation}."
            )

    def run(self, restart: bool) -> TrainingResult | None:
        recipe, trusted = self.recipe, self.recipe.allow_pickle
        self.source = source = resolve(recipe.model, recipe.revision, trusted) if recipe.model else None
        self.taught_by = find_teacher(recipe.distill.teacher, source, trusted) if recipe.distill else None
        loading.check_weights(source, self.taught_by)
        loading.check_heads(source, self.taught_by)
        with self._first():
            check_out(recipe.output, recipe.overwrite, source.path if source else None)
            if self.accelerator.is_main_process:
                self.folder.open(recipe, restart)
        started = time.monotonic()
        self.tokenizer = make_tokenizer(recipe, source, self.folder, self._first())
        self.boundary = Boundary.of(self.tokenizer) if recipe.isolate_documents is not False else None
        self.held_out = read_held_out(recipe, self.tokenizer)
        self.spread = self._spread()
        if self.boundary is not None and not self.spread.keeps_apart():
            if recipe.isolate_documents:
                raise UsageError(
                    "This model's class can't keep documents in a block apart.", "Leave out isolate_documents."
                )
            self.boundary = None
        self.optimizer = make_optimizer(self.spread.objective, recipe)
        self.schedule = make_schedule(self.optimizer, recipe)
        self.reader = self._reader()
        seed_own(recipe.seed, self.accelerator)
        self._resume()
        self.accelerator.init_trackers("uptrain", recipe.to_dict() if recipe.trackers else None)
        with on_stop_signal(lambda: setattr(self, "stop", True)):
            self._loop()
        held_out = self._evaluate() if self.held_out is not None else None
        return self._finish(held_out, time.monotonic() - started)

    def close(self) -> None:
        """Give up the folder, and the memory of models and optimizer: nothing refers to them any more."""
        self.folder.close()
        if hasattr(self, "spread"):
            self.spread.close()
        accelerator = self.accelerator
        vars(self).clear()
        accelerator.free_memory()

    @contextmanager
    def _first(self) -> Iterator[None]:
        # `with` can't skip its body, so the others run it too, after the first: all that is in it must allow that.
        with self.accelerator.main_process_first():
            yield

    def _spread(self) -> ParallelObjective:
        recipe = self.recipe
        model, self.dtype = make_model(recipe, self.source, self.tokenizer)
        teacher = self._load_teacher(self.taught_by) if self.taught_by else None
        objective = Objective(model, recipe.distill, teacher)
        if recipe.compile:
            objective.compile_bodies()
        return ParallelObjective(objective, self.accelerator, shards(recipe))

    def _reader(self) -> BlockReader:
        recipe = self.recipe
        with self._first():
            tokens = build_tokens(
                recipe.data, self.tokenizer, self.folder.tokens, self.accelerator.is_main_process, self._teacher_text
            )
        return open_reader(recipe.data, self.tokenizer, tokens, recipe.block_size, recipe.seed)

    def _teacher_text(self, source: TeacherText, folder: Path) -> None:
        recipe = self.recipe
        # A teacher whose weights are shared out can't write on one process alone.
        model = None if self.spread.sharded else self.spread.objective.teacher
        if model is None:
            place = self.taught_by or find_teacher(None, self.source, recipe.allow_pickle)
            model = self._load_teacher(place).to(self.accelerator.device)
        generate_tokens(model, self.tokenizer, source, recipe.block_size, recipe.seed, folder)

    def _load_teacher(self, place: Source) -> Any:
        low = self.accelerator.mixed_precision == "bf16"
        return load_teacher(place, low, self.recipe.attn_implementation)

    def _resume(self) -> None:
        found = self.folder.newest()
        if found is None:
            with self._first():
                self.folder.rewind_log(0)
            return
        path, saved = found
        state.load(path, self.spread.module, self.optimizer, self.accelerator)
        self.schedule.load_state_dict(saved["schedule"])
        self.reader.load_state_dict(saved["reader"])
        self.journal.load_state_dict(saved["journal"])
        self.step = self.resumed_from = int(saved["step"])
        self.last = LossMetrics(**saved["last"]) if saved["last"] else None
        self.best = tuple(saved["best"]) if saved["best"] else None
        if self.accelerator.is_main_process:
            self.folder.rewind_log(self.step)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.folder.begin(self.step)
        accelerator.wait_for_everyone()
        try:
            state.save(self.folder.partial(self.step), self.spread.module, self.optimizer, accelerator)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                schedule = {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}
                saved = {
                    "step": self.step, "reader": self.reader.state_dict(), "journal": self.journal.state_dict(),
                    "last": asdict(self.last) if self.last else None, "best": self.best,
                    "schedule": {**schedule, "lr_lambdas": [None] * len(self.schedule.lr_lambdas)},
                }  # fmt: skip
                self.folder.commit(self.step, saved)
        except OSError as error:
            self.folder.abandon(self.step, error)
        accelerator.wait_for_everyone()

    def _loop(self) -> None:
        recipe = self.recipe
        while self.step < recipe.total_steps:
            started = time.monotonic()
            learning_rate = float(self.schedule.get_last_lr()[0])
            self.last, norm, stop, skipped = self._train_step()
            self.step += 1
            if not skipped:
                self.journal.add(self.last, time.monotonic() - started)
            last = self.step == recipe.total_steps
            every = recipe.steps_between_evaluations
            due = every is not None and self.step % every == 0 and not last
            held_out = self._evaluate() if due and self.held_out is not None else None
            if held_out is not None:
                self._keep_best(held_out.cross_entropy)
            self._report(self.last, learning_rate, norm, held_out, skipped)
            if stop or (self.step % recipe.save_every == 0 and not last):
                self._save()
            if stop:
                raise Interrupted(
                    f"Interrupted at step {self.step} of {recipe.total_steps}; the run is saved in "
                    f"{self.folder.path}.", "Run the same command to go on."
                )  # fmt: skip

    def _train_step(self) -> tuple[LossMetrics, float, bool, str]:
        recipe, accelerator = self.recipe, self.accelerator
        batch = self._batch(self.reader.take(recipe.batch_size), self.boundary)
        # Every process sees the whole batch's tokens, so all know what the sum is to be divided by.
        counted, processes = batch.counted, accelerator.num_processes
        micro = batch.share(accelerator.process_index, processes, recipe.gradient_accumulation)
        sums = torch.zeros(5, device=accelerator.device)
        for position, part in enumerate(micro):
            with self.spread.micro_batch(position == len(micro) - 1):
                found = self._objective(part)
                # Processes' gradients are averaged, hence the factor.
                accelerator.backward(found[0] * (processes / max(1, counted)))
            sums[:4] += found.detach()
        norm = self.spread.clip(recipe.max_grad_norm)
        # One small exchange a step: the losses, and whether any process was told to stop, so that all do together.
        sums[4] = float(self.stop)
        sums = accelerator.reduce(sums, reduction="sum")
        figures = self._figures(sums[:4], counted)
        wrong = self.journal.complaint(figures.loss, norm)
        skipped = self._complain(wrong) if wrong else ""
        if not skipped:
            self.skips = 0
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return figures, norm, bool(sums[4] > 0), skipped

    def _batch(self, blocks: Tokens, boundary: Boundary | None) -> Batch:
        objective = self.spread.objective
        loading.check_tokens(objective.student, blocks)
        return batch_of(blocks, boundary, objective.has_encoder)

    def _objective(self, part: Batch) -> torch.Tensor:
        part = part.to(self.accelerator.device)
        found: torch.Tensor = self.spread.module(part.ids, part.targets, part.position_ids)
        return found

    def _figures(self, sums: torch.Tensor, tokens: int) -> LossMetrics:
        distill = self.recipe.distill
        return LossMetrics.of(sums, tokens, distill is not None, distill is not None and distill.hidden_weight > 0)

    def _complain(self, wrong: str) -> str:
        """Return what a log line says of a step that is left out; raise where the recipe says so."""
        recipe, step = self.recipe, self.step + 1
        where = f"{wrong} at step {step}, on sequences {step * recipe.batch_size - recipe.batch_size:,} to " \
                f"{step * recipe.batch_size - 1:,} of the run"  # fmt: skip
        self.skips += 1
        if recipe.on_bad_loss == "skip" and self.skips < _SKIPS:
            self.journal.skipped += 1
            return where + "; the step was left out."
        raise UptrainError(
            f"{where}." if self.skips < _SKIPS else f"{where}, the {_SKIPS}th in a row.",
            "Lower learning_rate or max_grad_norm, or set on_bad_loss: skip; the same command goes on from the last "
            "checkpoint.",
        )

    def _evaluate(self) -> LossMetrics:
        assert self.held_out is not None
        recipe, accelerator = self.recipe, self.accelerator
        ids, block = self.held_out.ids, recipe.scored_block_size
        # Documents run on as they do in `uptrain eval`, so that the figures compare.
        blocks = ids[: len(ids) // block * block].reshape(-1, block)
        batch = self._batch(blocks, None)
        rows = -(-len(batch.ids) // accelerator.num_processes)
        # As many tokens at once as a micro-batch has.
        micro = accelerator.num_processes * recipe.gradient_accumulation
        size = max(1, recipe.tokens_per_step // (micro * block))
        sums = torch.zeros(4, device=accelerator.device)
        with self.spread.evaluating():
            for number in range(-(-rows // size)):
                begin = (accelerator.process_index * rows) + number * size
                end = min(begin + size, (accelerator.process_index + 1) * rows, len(batch.ids))
                # Under FSDP all must run as often, so a process that has nothing left repeats the first and drops it.
                part = batch.rows(slice(begin, end)) if begin < end else batch.rows(slice(0, 1))
                found = self._objective(part)
                sums += found if begin < end else 0
        return self._figures(accelerator.reduce(sums, reduction="sum"), batch.counted)

    def _keep_best(self, loss: float) -> None:
        if self.best is not None and loss >= self.best[0]:
            return
        self.best = (loss, self.step)
        if self.accelerator.is_main_process:
            with self.folder.replacing("best") as folder:
                self._write_model(folder)
        else:
            self._write_model(None)
        self.accelerator.wait_for_everyone()

    def _write_model(self, folder: Path | None) -> None:
        """Write the model as it is now; all processes call this, and the one with a folder writes."""
        student = self.spread.objective.student
        weights = export.gather(student, self.dtype, keep=folder is not None)
        if folder is not None:
            model = export.assemble(student, weights, self.dtype)
            loading.save(model, self.tokenizer, folder, self.dtype, self.source)

    def _report(
        self, figures: LossMetrics, learning_rate: float, norm: float, held_out: LossMetrics | None, skipped: str
    ) -> None:
        recipe, journal = self.recipe, self.journal
        due = self.step % recipe.log_every == 0 or held_out is not None or self.step == recipe.total_steps
        if due or skipped:
            entry = journal.entry(self.step, learning_rate, norm)
            if held_out is not None:
                entry |= held_out.held_out_log()
            if self.accelerator.is_main_process:
                self.folder.record({**entry, **({"skipped": skipped} if skipped else {})})
            if recipe.trackers:
                self.accelerator.log(entry, step=self.step)
        if self.accelerator.is_main_process:
            left = journal.seconds_per_step * (recipe.total_steps - self.step)
            tokens = self.step * recipe.tokens_per_step
            memory = memory_bytes(self.accelerator.device)
            self.events.step(
                TrainingStep(
                    step=self.step,
                    steps=recipe.total_steps,
                    tokens=tokens,
                    loss=figures.loss,
                    learning_rate=learning_rate,
                    grad_norm=norm,
                    tokens_per_second=journal.speed,
                    seconds_left=left,
                    held_out_loss=None if held_out is None else held_out.cross_entropy,
                    divergence=figures.divergence,
                    memory_bytes=memory,
                    skipped=skipped,
                )
            )

    def _finish(self, held_out: LossMetrics | None, seconds: float) -> TrainingResult | None:
        recipe, accelerator = self.recipe, self.accelerator
        out: TrainingResult | None = None
        loss = None if held_out is None else held_out.cross_entropy
        best = self.best if recipe.keep == "best" and self.best and loss is not None and self.best[0] < loss else None
        if best is not None:
            loss = best[0]
        bits = None
        if loss is not None and self.held_out is not None and held_out is not None:
            bits = loss / math.log(2) * len(self.held_out.ids) / self.held_out.bytes
            if accelerator.is_main_process:
                entry = {"step": self.step, "tokens": self.step * recipe.tokens_per_step, **held_out.held_out_log()}
                self.folder.record({**entry, "held_out_bits_per_byte": round(bits, 5)})
        teacher = self.taught_by.name if self.taught_by else None
        out = TrainingResult(
            out=recipe.output,
            steps=self.step,
            tokens=self.step * recipe.tokens_per_step,
            loss=self.last.loss if self.last else math.nan,
            held_out_loss=loss,
            bits_per_byte=bits,
            best_step=best[1] if best else None,
            skipped=self.journal.skipped,
            teacher=teacher,
            precision=precision_of(self.accelerator),
            resumed_from=self.resumed_from,
            num_processes=accelerator.num_processes,
            sharded=self.spread.sharded,
            isolated=self.boundary is not None,
            seconds=round(seconds, 1),
        )
        self._write(out, best is not None)
        if accelerator.is_main_process:
            self.folder.remove()
        accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:
            tracker.finish()
        return out if accelerator.is_main_process else None

    def _write(self, done: TrainingResult, best: bool) -> None:
        recipe, source = self.recipe, self.source
        if not self.accelerator.is_main_process:
            if not best:
                self._write_model(None)
            return
        stage = {
            "stage": "train",
            "recipe": recipe.to_dict(),
            "source": source.name if source else None,
            "revision": source.revision if source else None,
            "data": counts_of(self.reader),
            **{key: value for key, value in done.to_dict().items() if key not in ("out", "resumed_from", "seconds")},
        }
        with staged_output(recipe.output, recipe.overwrite) as folder:
            if best:
                shutil.copytree(self.folder.path / "best", folder, dirs_exist_ok=True)
            else:
                self._write_model(folder)
            (folder / "train_log.jsonl").write_bytes(self.folder.log.read_bytes())
            if self.plot:
                plots.training(folder)
            append_stage(folder, source.path if source else None, stage)
