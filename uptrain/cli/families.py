"""`uptrain families`: its options, its call, and the table for a terminal, as JSON and as docs/families.md."""

from __future__ import annotations

from collections.abc import Sequence

import click

from uptrain.cli import console
from uptrain.cli.options import json_option
from uptrain.conversion.family_table import FamilyRow, Holder, alike
from uptrain.methods.registry import METHODS

COLUMNS = ("family", "q, k, v", "position", "to GQA", "to MQA", "to MLA", "methods")
REMOTE_CODE = "readable modelling code inside the checkpoint: `trust_remote_code=True`, or `import uptrain`"


@click.command()
@json_option
@click.option("--markdown", is_flag=True, help="Print the table of docs/families.md.")
def families(as_json: bool, markdown: bool) -> None:
    """List the model families that can be converted, and the class that holds each result.

    Where several classes are named, the first that is exact for the checkpoint takes it. A class marked * ships its
    own modelling file inside the checkpoint.
    """
    from uptrain.conversion.family_table import families as known

    if markdown:
        console.result(_markdown(known()))
        return
    _show(known(), as_json)


def _show(found: Sequence[FamilyRow], as_json: bool) -> None:
    """Show every family that can be converted."""
    if as_json:
        console.result_json([family.to_dict() for family in found])
        return
    console.table("", COLUMNS, [(family.model_type, *_cells(family)) for family in found], align="left")
    console.result(f"* {REMOTE_CODE}; {_note()}.".replace("`", ""))


def _markdown(found: Sequence[FamilyRow]) -> str:
    """Return the table of docs/families.md; families that differ in nothing but their name share a row."""
    rows = [(", ".join(family.model_type for family in group), *_cells(group[0])) for group in alike(found)]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n\\* {REMOTE_CODE}; {_note()}."


def _pooling() -> list[str]:
    return [method.name for method in METHODS.values() if not method.mixes_dims]


def _note() -> str:
    return f"pooling: `--method` {', '.join(_pooling())}"


def _cells(family: FamilyRow) -> tuple[str, ...]:
    return (
        family.packing,
        family.position,
        *(_held(family, holders) for holders in (family.gqa, family.mqa, family.mla)),
        _methods(family),
    )


def _held(family: FamilyRow, holders: tuple[Holder, ...]) -> str:
    words = [
        ("itself" if holder.model_type == family.model_type else holder.model_type)
        + (" *" if holder.remote_code else "")
        + (f", with {holder.needs}" if holder.needs else "")
        for holder in holders
    ]
    return ", else ".join(words) or "–"


def _methods(family: FamilyRow) -> str:
    missing = [name for name in METHODS if name not in family.methods]
    words = f"all but {', '.join(missing)}" if missing else "all"
    words = "pooling" if list(family.methods) == _pooling() else words
    return words + "".join(f"; with {key} pooling" for key in family.pool_only_with)
