"""Train a checkpoint, or a new model, on text: one loop for one process or many, exact to resume."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from uptrain import models
from uptrain.checkpoint.manifest import append_stage
from uptrain.checkpoint.source import Source, resolve
from uptrain.checkpoint.writer import check_out, staged
from uptrain.data import BlockReader, TokenFile, TokenText, build_tokens, open_reader, read_tokens
from uptrain.documents import pieces
from uptrain.engine import make_accelerator, make_optimizer, on_stop_signal
from uptrain.errors import Interrupted, UptrainError, UsageError
from uptrain.hosts import latent_norm
from uptrain.recipe_schema import Recipe, TokenizerSpec
from uptrain.runfolder import RunFolder


@dataclass(frozen=True)
class Step:
    """Progress after an optimizer step: what a progress line shows."""

    step: int
    steps: int
    tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    held_out_loss: float | None = None


@dataclass(frozen=True)
class Training:
    """A finished run; losses are in nats per token."""

    out: Path
    steps: int
    tokens: int
    loss: float
    held_out_loss: float | None
    bits_per_byte: float | None
    resumed_from: int
    num_processes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


def train(recipe: Recipe, on_step: Callable[[Step], None] | None = None, restart: bool = False) -> Training | None:
    """Run a recipe and write the result to its `output`; a run that was cut off is taken up where it stopped.

    Under torchrun or accelerate launch every process calls this; `on_step` is called in the first one, which also
    returns the result, while the others return None.

    Raises:
        UsageError: the recipe can't be carried out.
        Interrupted: Ctrl-C or SIGTERM; the run is saved.
        UptrainError: the loss is not a number any more.
    """
    models.quiet()
    run = _Run(recipe, on_step)
    try:
        return run.run(restart)
    finally:
        run.folder.close()


def lm_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy in nats of `ids` (sequences, tokens), computed in fp32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class _Run:
    def __init__(self, recipe: Recipe, on_step: Callable[[Step], None] | None) -> None:
        self.recipe, self.on_step = recipe, on_step
        self.accelerator = make_accelerator(recipe)
        self.folder = RunFolder(recipe.output)
        self.step = 0
        self.resumed_from = 0
        self.loss = math.nan
        self.window: list[float] = []
        self.pace: deque[float] = deque(maxlen=50)
        self.stop = False
        share = self.accelerator.num_processes * recipe.gradient_accumulation
        if recipe.batch_size % share:
            raise UsageError(
                f"batch_size {recipe.batch_size} counts a whole step's sequences, so it must be a multiple of "
                f"{self.accelerator.num_processes} process(es) × gradient_accumulation "
                f"{recipe.gradient_accumulation}."
            )

    def run(self, restart: bool) -> Training | None:
        recipe, accelerator = self.recipe, self.accelerator
        source = resolve(recipe.model, recipe.revision) if recipe.model else None
        self.source = source
        with self._first():
            check_out(recipe.output, recipe.overwrite, source.path if source else None)
            if accelerator.is_main_process:
                self.folder.open(recipe, restart)
        started = time.monotonic()
        self.tokenizer = self._tokenizer(source)
        self.held_out = self._read_held_out()
        model = self._model(source)
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(model, recipe))
        self.schedule = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimizer.optimizer, recipe.warmup_steps, recipe.total_steps, min_lr_rate=recipe.min_lr_ratio
        )
        self.reader = self._reader()
        self._resume()
        with on_stop_signal(self._stop):
            self._loop()
        held_out = self._evaluate() if self.held_out is not None else None
        return self._finish(source, held_out, time.monotonic() - started)

    def _stop(self) -> None:
        self.stop = True

    @contextmanager
    def _first(self) -> Iterator[None]:
        # `with` can't skip its body, so the others run it too, after the first: all that is in it must allow that.
        with self.accelerator.main_process_first():
            yield

    def _tokenizer(self, source: Source | None) -> Any:
        spec = self.recipe.tokenizer
        if isinstance(spec, TokenizerSpec):
            with self._first():
                if not self.folder.tokenizer.is_dir():
                    texts = (piece.text for piece in pieces(self.recipe.data))
                    partial = self.folder.tokenizer.with_suffix(".partial")
                    models.new_tokenizer(spec, texts).save_pretrained(partial)
                    partial.rename(self.folder.tokenizer)
            return models.load_tokenizer(self.folder.tokenizer)
        if spec is not None:
            return models.load_tokenizer(resolve(spec).path)
        assert source is not None
        return models.load_tokenizer(source.path)

    def _model(self, source: Source | None) -> Any:
        recipe = self.recipe
        if source is None:
            assert recipe.config is not None
            model = models.new_model(recipe.config, self.tokenizer, recipe.seed)
            self.dtype = models.dtype_named(recipe.dtype) or torch.bfloat16
        else:
            model = models.load_model(source)
            self.dtype = models.dtype_named(recipe.dtype) or model.dtype
            if latent_norm.unfold(model):
                latent_norm.check_dtype(self.dtype)
        longest = getattr(model.config, "max_position_embeddings", None)
        if isinstance(longest, int) and recipe.block_size > longest:
            raise UsageError(f"block_size {recipe.block_size} is longer than the model's {longest} positions.")
        torch.manual_seed(recipe.seed)
        # Master weights are fp32; autocast makes the low-precision copies.
        return model.float().train()

    def _reader(self) -> BlockReader:
        recipe = self.recipe
        with self._first():
            tokens = build_tokens(recipe.data, self.tokenizer, self.folder.tokens, self.accelerator.is_main_process)
        return open_reader(recipe.data, self.tokenizer, tokens, recipe.block_size, recipe.seed)

    def _read_held_out(self) -> TokenText | None:
        recipe = self.recipe
        if not recipe.held_out:
            return None
        text = read_tokens(recipe.held_out, self.tokenizer, recipe.held_out_tokens)
        if len(text.ids) < recipe.block_size:
            raise UsageError(f"held_out has only {len(text.ids)} tokens, less than one block.", "Give more text.")
        return text

    def _resume(self) -> None:
        found = self.folder.newest()
        if found is None:
            with self._first():
                self.folder.rewind_log(0)
            return
        path, state = found
        self.accelerator.load_state(str(path))
        self.schedule.load_state_dict(state["schedule"])
        self.reader.load_state_dict(state["reader"])
        self.step = self.resumed_from = int(state["step"])
        self.window, self.loss = list(state["window"]), float(state["loss"])
        if self.accelerator.is_main_process:
            self.folder.rewind_log(self.step)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.folder.begin(self.step)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(self.folder.path / f"checkpoint-{self.step}.partial"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            schedule = {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}
            state = {"step": self.step, "reader": self.reader.state_dict(), "window": self.window, "loss": self.loss,
                     "schedule": {**schedule, "lr_lambdas": [None] * len(self.schedule.lr_lambdas)}}  # fmt: skip
            self.folder.commit(self.step, state)
        accelerator.wait_for_everyone()

    def _loop(self) -> None:
        recipe = self.recipe
        while self.step < recipe.total_steps:
            started = time.monotonic()
            learning_rate = self.schedule.get_last_lr()[0]
            self.loss, norm, stop = self._train_step()
            self.step += 1
            self.pace.append(time.monotonic() - started)
            if not math.isfinite(self.loss):
                raise UptrainError(
                    f"The loss became {self.loss} at step {self.step}.",
                    "Lower learning_rate or max_grad_norm; the same command goes on from the last checkpoint.",
                )
            self.window.append(self.loss)
            last = self.step == recipe.total_steps
            due = recipe.eval_every is not None and self.step % recipe.eval_every == 0 and not last
            held_out = self._evaluate() if due and self.held_out is not None else None
            self._report(self.loss, learning_rate, norm, held_out)
            if stop or (self.step % recipe.save_every == 0 and not last):
                self._save()
            if stop:
                raise Interrupted(
                    f"Interrupted at step {self.step} of {recipe.total_steps}; the run is saved in "
                    f"{self.folder.path}.", "Run the same command to go on."
                )  # fmt: skip

    def _train_step(self) -> tuple[float, float, bool]:
        recipe, accelerator = self.recipe, self.accelerator
        blocks = torch.from_numpy(self.reader.take(recipe.batch_size))
        mine = blocks[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros((), device=accelerator.device)
        norm = torch.zeros(())
        for micro in mine.chunk(recipe.gradient_accumulation):
            with accelerator.accumulate(self.model):
                loss = lm_loss(self.model, micro.to(accelerator.device))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / recipe.gradient_accumulation
        self.schedule.step()
        # One small reduction a step: the loss, and whether any process was told to stop, so that all do together.
        shared = accelerator.reduce(torch.stack([total, total.new_tensor(float(self.stop))]), reduction="mean")
        return float(shared[0]), float(norm), bool(shared[1] > 0)

    @torch.no_grad()
    def _evaluate(self) -> float:
        assert self.held_out is not None
        recipe, accelerator = self.recipe, self.accelerator
        ids = torch.from_numpy(self.held_out.ids)
        blocks = ids[: len(ids) // recipe.block_size * recipe.block_size].view(-1, recipe.block_size)
        mine = blocks[accelerator.process_index :: accelerator.num_processes]
        micro = max(1, recipe.batch_size // (accelerator.num_processes * recipe.gradient_accumulation))
        total = torch.zeros(2, device=accelerator.device)
        self.model.eval()
        for rows in mine.split(micro):
            loss = lm_loss(self.model, rows.to(accelerator.device))
            total += torch.stack([loss * len(rows), loss.new_tensor(float(len(rows)))])
        self.model.train()
        total = accelerator.reduce(total, reduction="sum")
        return float(total[0] / total[1])

    def _report(self, loss: float, learning_rate: float, norm: float, held_out: float | None) -> None:
        recipe = self.recipe
        if not self.accelerator.is_main_process:
            if self.step % recipe.log_every == 0:
                self.window = []
            return
        pace = sum(self.pace) / len(self.pace)
        speed = recipe.tokens_per_step / pace
        tokens = self.step * recipe.tokens_per_step
        if self.step % recipe.log_every == 0 or held_out is not None or self.step == recipe.total_steps:
            entry = {"step": self.step, "tokens": tokens, "loss": round(sum(self.window) / len(self.window), 5),
                     "lr": float(f"{learning_rate:.4g}"), "grad_norm": round(norm, 4),
                     "tokens_per_s": round(speed)}  # fmt: skip
            self.window = []
            self.folder.record(entry if held_out is None else {**entry, "held_out_loss": round(held_out, 5)})
        if self.on_step:
            left = pace * (recipe.total_steps - self.step)
            self.on_step(Step(self.step, recipe.total_steps, tokens, loss, learning_rate, norm, speed, left, held_out))

    def _finish(self, source: Source | None, held_out: float | None, seconds: float) -> Training | None:
        recipe, accelerator = self.recipe, self.accelerator
        out: Training | None = None
        if accelerator.is_main_process:
            bits = None
            if held_out is not None and self.held_out is not None:
                bits = held_out / math.log(2) * len(self.held_out.ids) / self.held_out.bytes
                entry = {"step": self.step, "tokens": self.step * recipe.tokens_per_step,
                         "held_out_loss": round(held_out, 5), "held_out_bits_per_byte": round(bits, 5)}  # fmt: skip
                self.folder.record(entry)
            out = Training(recipe.output, self.step, self.step * recipe.tokens_per_step, self.loss, held_out, bits,
                           self.resumed_from, accelerator.num_processes, round(seconds, 1))  # fmt: skip
            self._write(source, out)
            self.folder.remove()
        accelerator.wait_for_everyone()
        accelerator.free_memory()
        return out

    def _write(self, source: Source | None, result: Training) -> None:
        recipe = self.recipe
        count = asdict(self.reader.count) if isinstance(self.reader, TokenFile) else None
        stage = {
            "stage": "train",
            "recipe": recipe.to_dict(),
            "source": source.name if source else None,
            "revision": source.revision if source else None,
            "data": count,
            **{key: value for key, value in result.to_dict().items() if key not in ("out", "resumed_from", "seconds")},
        }
        with staged(recipe.output, recipe.overwrite) as folder:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            latent_norm.fold(model, self.dtype)
            models.save(model, self.tokenizer, folder, self.dtype, source)
            (folder / "train_log.jsonl").write_bytes(self.folder.log.read_bytes())
            append_stage(folder, source.path if source else None, stage)
