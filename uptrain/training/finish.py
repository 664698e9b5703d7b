"""The end of a run: its result and the checkpoint folder, committed whole or not at all."""

from __future__ import annotations

import math
import shutil
import time

from uptrain.checkpoint.manifest import append_stage
from uptrain.checkpoint.output_folder import staged_output
from uptrain.data.readers import counts_of
from uptrain.training import plots
from uptrain.training.export import write_model
from uptrain.training.metrics import LossMetrics, TrainingResult
from uptrain.training.trainer import Trainer


def finish(trainer: Trainer, held_out: LossMetrics | None, plot: bool) -> TrainingResult | None:
    """Write the trained checkpoint and remove the run folder; all processes call this.

    - `trainer`: after its last step.
    - `held_out`: the losses of the held-out text; None without one.
    - `plot`: draw the log to training.png.

    Returns the result in the first process and None in the others.
    """
    setup = trainer.setup
    accelerator = setup.accelerator
    result = _result(trainer, held_out)
    if accelerator.is_main_process:
        if held_out is not None and result.bits_per_byte is not None:
            entry = {"step": result.steps, "tokens": result.tokens, **held_out.held_out_log()}
            trainer.folder.record({**entry, "held_out_bits_per_byte": round(result.bits_per_byte, 5)})
        _write(trainer, result, plot)
        trainer.folder.remove()
    elif result.best_step is None:
        write_model(setup, None)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return result if accelerator.is_main_process else None


def _result(trainer: Trainer, held_out: LossMetrics | None) -> TrainingResult:
    setup, recipe, text = trainer.setup, trainer.setup.recipe, trainer.setup.held_out
    loss = bits = best_step = None
    if held_out is not None and text is not None:
        loss = held_out.cross_entropy
        if recipe.keep == "best" and trainer.best and trainer.best[0] < loss:
            loss, best_step = trainer.best
        bits = loss / math.log(2) * len(text.ids) / text.bytes
    return TrainingResult(
        out=recipe.output,
        steps=trainer.done,
        tokens=trainer.done * recipe.tokens_per_step,
        loss=trainer.last.loss if trainer.last else math.nan,
        held_out_loss=loss,
        bits_per_byte=bits,
        best_step=best_step,
        skipped=trainer.guard.skipped,
        teacher=setup.teacher.name if setup.teacher else None,
        precision="bf16" if setup.accelerator.mixed_precision == "bf16" else "fp32",
        resumed_from=trainer.resumed_from,
        num_processes=setup.accelerator.num_processes,
        sharded=setup.objective.sharded,
        isolated=setup.boundary is not None,
        seconds=round(time.monotonic() - setup.started, 1),
    )


def _write(trainer: Trainer, result: TrainingResult, plot: bool) -> None:
    setup, recipe, source = trainer.setup, trainer.setup.recipe, trainer.setup.model
    stage = {
        "stage": "train",
        "recipe": recipe.to_dict(),
        "source": source.name if source else None,
        "revision": source.revision if source else None,
        "data": counts_of(setup.reader),
        **{key: value for key, value in result.to_dict().items() if key not in ("out", "resumed_from", "seconds")},
    }
    with staged_output(recipe.output, recipe.overwrite) as folder:
        if result.best_step is not None:
            shutil.copytree(trainer.folder.path / "best", folder, dirs_exist_ok=True)
        else:
            write_model(setup, folder)
        (folder / "train_log.jsonl").write_bytes(trainer.folder.log.read_bytes())
        if plot:
            plots.training(folder)
        append_stage(folder, source.path if source else None, stage)
