"""`uptrain recipes`: list, show and copy the recipes that come with uptrain."""

from __future__ import annotations

from pathlib import Path

import click

from uptrain.cli import console
from uptrain.cli.options import examples
from uptrain.errors import UsageError
from uptrain.formatting import typed


@click.group(epilog=examples("uptrain recipes list", "uptrain recipes copy gqa-uptrain"))
def recipes() -> None:
    """List, show or copy the recipes that come with uptrain."""


@recipes.command("list")
def list_recipes() -> None:
    """List every recipe that comes with uptrain, and what it does."""
    from uptrain.training import recipes

    console.facts("", [(name, recipes.summary(path)) for name, path in recipes.shipped().items()])


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print a recipe."""
    from uptrain.training import recipes

    console.result(recipes.find_recipe(name).read_text(encoding="utf-8").rstrip())


@recipes.command("copy")
@click.argument("name")
@click.argument("to", required=False, type=click.Path(path_type=Path))
def copy_recipe(name: str, to: Path | None) -> None:
    """Copy a recipe that comes with uptrain to TO (default: ./NAME.yaml), to edit it."""
    from uptrain.training import recipes

    source = recipes.find_recipe(name)
    target = to or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UsageError(f"{target} already exists.", "Name another file.")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    console.result(f"Wrote {target}. Edit it, then: uptrain train {typed(target)}")
