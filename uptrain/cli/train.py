"""The commands that train: options and help. Bodies import what they need when they run."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import click

from uptrain.cli import console
from uptrain.cli.types import device_option
from uptrain.errors import UptrainError, UsageError
from uptrain.formatting import typed
from uptrain.models import devices


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--restart", is_flag=True, help="Forget an unfinished run of the same output instead of resuming it.")
@click.option("--plot", is_flag=True, help="Draw loss, divergence, learning rate and speed to OUTPUT/training.png.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def train(recipe: str, overrides: tuple[str, ...], restart: bool, plot: bool, as_json: bool) -> None:
    """Train a checkpoint, or a new model, as RECIPE says: a YAML file or the name of a shipped one.

    KEY=VALUE replaces a recipe's value; dots reach inside (tokenizer.vocab_size=8192), lists are YAML. A run that
    was cut off goes on when the same command is repeated. Losses go to OUTPUT.run/train_log.jsonl as it trains.

    \b
    uptrain train recipes/demo-uptrain.yaml
    uptrain train gqa-uptrain model=./llama-gqa4 output=./llama-up 'data=[corpus/*.txt]' tokens=100000000
    uptrain train gqa-uptrain model=./llama-gqa4 output=./llama-up data=[python-stdlib] distill.weight=0.5 --plot
    torchrun --nproc_per_node 8 -m uptrain train gqa-uptrain …
    """
    from uptrain.training import recipes

    first = not devices.rank()
    try:
        loaded = recipes.load(recipe, overrides)
        if first:
            console.note(f"Training {loaded.model or 'a new model'} for {loaded.total_steps:,} steps → {loaded.output}")
        from uptrain.training.trainer import train as run

        with console.training_progress(loaded.total_steps, hidden=not first) as show:
            done = run(loaded, show, restart, plot)
    except UptrainError as error:
        _say_once(error)
    if done is not None:
        from uptrain.cli import train_report

        train_report.training(done, loaded, as_json)


def _say_once(error: UptrainError) -> NoReturn:
    """End a process of a run with its error's exit code; the first speaks for all, another of what only it knows."""
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


@click.group()
def recipes() -> None:
    """List, show or copy the recipes that come with uptrain."""


@recipes.command("list")
def list_recipes() -> None:
    """Name every shipped recipe and what it is for."""
    from uptrain.cli import train_report
    from uptrain.training import recipes

    found = recipes.shipped()
    train_report.recipe_list(found, {name: recipes.summary(path) for name, path in found.items()})


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print a recipe."""
    from uptrain.training import recipes

    console.result(recipes.find(name).read_text(encoding="utf-8").rstrip())


@recipes.command("copy")
@click.argument("name")
@click.argument("to", required=False, type=click.Path(path_type=Path))
def copy_recipe(name: str, to: Path | None) -> None:
    """Copy a shipped recipe to TO (default ./NAME.yaml), to edit it."""
    from uptrain.training import recipes

    source = recipes.find(name)
    target = to or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UsageError(f"{target} exists already.", "Name another file.")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    console.result(f"Wrote {target}. Edit it, then: uptrain train {typed(target)}")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("uptrain-demo"), show_default=True,
              help="Folder for the two checkpoints.")  # fmt: skip
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def demo(out: Path, as_json: bool) -> None:
    """Show the whole way on the embedded demo model, in about two minutes on two cores.

    Converts it to 4 key/value heads, uptrains that briefly, and compares both with the original. Downloads nothing.
    """
    from uptrain.cli import evaluate_report
    from uptrain.training import recipes
    from uptrain.workflows.demo.run import RECIPE, UPTRAINED_ON, run

    recipe = recipes.load(RECIPE, (f"tokens={UPTRAINED_ON}",))
    with console.training_progress(recipe.total_steps) as show:
        found = run(out, console.note, show)
    evaluate_report.demo(found, as_json)


COMMANDS: dict[str, click.Command] = {
    "train": train, "recipes": recipes, "demo": demo,
}  # fmt: skip
"""What the command line adds, by the name it is typed under."""
