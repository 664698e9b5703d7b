"""`uptrain demo`: its options, its call and the table it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from uptrain.cli import console
from uptrain.cli.evaluate import how_measured, models_table
from uptrain.cli.options import device_option, examples, json_option

if TYPE_CHECKING:
    from uptrain.workflows.demo.run import Demo


@click.command(epilog=examples("uptrain demo"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("uptrain-demo"), show_default=True,
              help="Folder of the two checkpoints.")  # fmt: skip
@device_option
@json_option
def demo(out: Path, as_json: bool) -> None:
    """Convert, uptrain and evaluate the embedded demo model.

    This takes about two minutes on two cores. The demo model gets 4 key/value heads instead of 8, and is uptrained
    briefly. Both results are compared with the original. Nothing is downloaded.
    """
    from uptrain.checkpoint.events import Events
    from uptrain.training import recipes
    from uptrain.workflows.demo.run import RECIPE, UPTRAINED_ON, run_demo

    recipe = recipes.load_recipe(RECIPE, (f"tokens={UPTRAINED_ON}",))
    with console.training_progress(recipe.total_steps) as show:
        found = run_demo(out, events=Events(note=console.note, step=show))
    _show(found, as_json)


def _show(found: Demo, as_json: bool) -> None:
    """Print the demo's three models in one table."""
    if as_json:
        console.result_json(found.to_dict())
        return
    shown = [
        ("original", found.original, None),
        ("GQA-4 converted", found.converted.model, found.converted),
        ("GQA-4 uptrained", found.uptrained.model, found.uptrained),
    ]
    console.table("", *models_table(shown))
    console.note(how_measured(found.uptrained))
    console.note(f"The checkpoints are in {found.folder}. Next: uptrain inspect MODEL, uptrain convert MODEL --to gqa")
