"""`train`: from a recipe to a trained checkpoint, on one process or many, resumed to the same bits."""

from __future__ import annotations

from uptrain.checkpoint.events import Events
from uptrain.models import devices, loading
from uptrain.training import plots, recipes
from uptrain.training.accelerator import LESS_MEMORY, make_accelerator
from uptrain.training.finish import finish
from uptrain.training.launch import accelerate_device, report_lost_process
from uptrain.training.metrics import TrainingResult
from uptrain.training.optimizer import check_optimizer
from uptrain.training.recipe import Recipe
from uptrain.training.run_folder import RunFolder
from uptrain.training.setup import prepared
from uptrain.training.trainer import Trainer


def train(
    recipe: Recipe, *, restart: bool = False, plot: bool = False, events: Events = Events()
) -> TrainingResult | None:
    """Run a recipe and write the result to its `output`. An interrupted run is resumed at its last checkpoint.

    Under torchrun or accelerate launch, every process calls this. `devices.using` chooses the device.

    - `recipe`: what to train, on which text, for how long.
    - `restart`: delete an unfinished run of the same output instead of resuming it.
    - `plot`: draw the log to training.png in the output folder.
    - `events`: `step` receives a `TrainingStep` after each optimizer step, in the first process.

    Returns the result in the first process and None in the others.

    Raises:
        UsageError: the recipe can't be carried out.
        Interrupted: Ctrl-C or SIGTERM; the run is saved.
        UptrainError: a loss is not finite, a checkpoint can't be written, memory is full, or a process is lost.
    """
    recipes.check_model(recipe)
    check_optimizer(recipe)
    loading.quiet()
    if plot:
        plots.check()
    with accelerate_device(), report_lost_process(), devices.enough_memory("Training", LESS_MEMORY):
        accelerator = make_accelerator(recipe)
        with RunFolder(recipe.output) as folder, prepared(recipe, accelerator, folder, restart) as setup:
            trainer = Trainer(setup, folder, events)
            try:
                held_out = trainer.run()
                return finish(trainer, held_out, plot)
            finally:
                trainer.close()
