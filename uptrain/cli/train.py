"""`uptrain train`: its options, its call and what it prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import click

from uptrain.checkpoint.manifest import converted_from
from uptrain.cli import console
from uptrain.cli.options import device_option, examples, json_option
from uptrain.errors import UptrainError
from uptrain.formatting import counted, typed
from uptrain.models import devices

if TYPE_CHECKING:
    from uptrain.training.metrics import TrainingResult
    from uptrain.training.recipe import Recipe


@click.command(
    epilog=examples(
        "uptrain train recipes/demo-uptrain.yaml",
        "uptrain train gqa-uptrain model=./llama-gqa4 output=./llama-up 'data=[corpus/*.txt]' tokens=100000000",
        "uptrain train gqa-uptrain model=./llama-gqa4 output=./llama-up data=[python-stdlib] distill.weight=0.5 --plot",
        "torchrun --nproc_per_node 8 -m uptrain train gqa-uptrain …",
    )
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--restart", is_flag=True, help="Discard an unfinished run of the same output instead of resuming it.")
@click.option("--plot", is_flag=True, help="Draw loss, divergence, learning rate and speed to OUTPUT/training.png.")
@device_option
@json_option
def train(recipe: str, overrides: tuple[str, ...], restart: bool, plot: bool, as_json: bool) -> None:
    """Train a checkpoint, or a new model, by a recipe.

    RECIPE is a YAML file, or the name of a recipe that comes with uptrain. KEY=VALUE replaces a value of the recipe.
    A dot separates nested keys (tokenizer.vocab_size=8192), and lists are YAML.

    To resume an interrupted run, repeat the same command. Losses are logged to OUTPUT.run/train_log.jsonl.
    """
    from uptrain.training import recipes

    first = not devices.rank()
    try:
        loaded = recipes.load_recipe(recipe, overrides)
        recipes.check_model(loaded)
        if first:
            console.note(
                f"Training {loaded.model or 'a new model'} for {counted(loaded.total_steps, 'step')} → {loaded.output}"
            )
        from uptrain.checkpoint.events import Events
        from uptrain.training.run import train as run

        with console.training_progress(loaded.total_steps, hidden=not first) as show:
            done = run(loaded, restart=restart, plot=plot, events=Events(step=show))
    except UptrainError as error:
        _say_once(error)
    if done is not None:
        _show(done, loaded, as_json)


def _say_once(error: UptrainError) -> NoReturn:
    """End this process with the exit code of `error`. The first process prints it, others only what is theirs."""
    processes, _ = devices.launched()
    if processes > 1:
        from uptrain.training.launch import announce

        said = announce(error)
        if devices.rank():
            if said:
                where = f"Process {devices.rank()} of {processes}: "
                console.fail(UptrainError(where + error.message, error.hint))
            raise click.exceptions.Exit(error.exit_code) from None
    raise error


def _show(done: TrainingResult, recipe: Recipe, as_json: bool) -> None:
    """Print a finished run and the next command."""
    if as_json:
        console.result_json(done.to_dict())
        return
    amount = f"{counted(done.steps, 'step')}, {counted(done.tokens, 'token')}"
    pairs = [("trained", f"{amount} on {counted(done.num_processes, 'process', 'processes')}")]
    if not done.isolated and recipe.isolate_documents is None:
        pairs.append(("documents", "not isolated within a block: the model's class does not support it"))
    if done.resumed_from:
        pairs.append(("resumed", f"from step {done.resumed_from:,}"))
    if done.teacher:
        pairs.append(("teacher", done.teacher))
    pairs.append(("loss", f"{done.loss:.4f} nats per token at the last step ({done.precision})"))
    if done.skipped:
        pairs.append(("left out", f"{counted(done.skipped, 'step')} with a bad loss; train_log.jsonl lists them"))
    if done.held_out_loss is not None:
        words = f"{done.held_out_loss:.4f} nats per token, perplexity {math.exp(done.held_out_loss):.2f}"
        best = "" if done.best_step is None else f"; from step {done.best_step:,}, the best"
        pairs.append(("held out", f"{words}, {done.bits_per_byte:.3f} bits per byte{best}"))
    pairs.append(("time", f"{done.seconds:,.0f} s"))
    console.facts(f"Wrote {done.out}", pairs)
    source = converted_from(done.out)
    original = str(source["name"]) if source else recipe.model
    trusted = " --allow-pickle" if recipe.allow_pickle else ""
    console.note(
        f"Next: uptrain eval {typed(done.out)}" + (f" --baseline {typed(original)}{trusted}" if original else "")
    )
