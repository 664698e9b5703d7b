"""`uptrain families`: its options, its call, and the table for a terminal, as JSON and as docs/families.md."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from uptrain.cli import console
from uptrain.cli.options import examples, json_option
from uptrain.conversion.family_table import FamilyRow, Holder, group_rows
from uptrain.methods.registry import METHODS


@click.command(epilog=examples("uptrain families", "uptrain families --json"))
@json_option
@click.option("--markdown", is_flag=True, help="Print the table of docs/families.md.")
def families(as_json: bool, markdown: bool) -> None:
    """List the model families that uptrain converts, and the target class of each result.

    If several classes are listed, the result gets the first one that computes exactly the same. The code of a class
    with a * is stored inside the checkpoint.
    """
    from uptrain.conversion.family_table import families as known

    if markdown:
        console.result(_markdown(known()))
        return
    _show(known(), as_json)


def _show(found: Sequence[FamilyRow], as_json: bool) -> None:
    """Print what each family becomes, in 80 columns."""
    if as_json:
        console.result_json([family.to_dict() for family in found])
        return
    rows = []
    for family in found:
        cells = (_heads_class(family), _target_class(family, family.mla), _methods(family))
        rows.append((family.model_type, *map(_in_lines, cells)))
    console.table("", ("family", "GQA, MQA class", "MLA class", "methods"), rows, align="left")
    console.result("Of two classes, the result gets the first one that computes exactly the same.")
    console.result("itself: the family's own class in transformers.")
    console.result("*: a class whose code is inside the checkpoint: trust_remote_code=True, or import uptrain.")
    for family in found:
        for holder in family.gqa:
            if holder.needs:
                console.result(f"†: GQA of {family.model_type} needs {holder.needs} in the source's config.json.")
    console.result(f"{_pooling_note()}.")
    console.note("--markdown adds how each family stores its heads and encodes positions.")


def _markdown(found: Sequence[FamilyRow]) -> str:
    """Return the table of docs/families.md; families that differ in nothing but their name share a row."""
    columns = ("family", "q, k, v", "position", "to GQA", "to MQA", "to MLA", "methods")
    rows = []
    for group in group_rows(found):
        first = group[0]
        classes = (_target_class(first, classes) for classes in (first.gqa, first.mqa, first.mla))
        names = ", ".join(family.model_type for family in group)
        rows.append((names, first.packing, first.position, *classes, _methods(first)))
    lines = [columns, ("---",) * len(columns), *rows]
    note = (
        "readable modelling code inside the checkpoint: `trust_remote_code=True`, or `import uptrain`; "
        f"{_pooling_note().replace('--method', '`--method`')}."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n\\* {note}"


def _pooling() -> list[str]:
    return [method.name for method in METHODS.values() if not method.mixes_dims]


def _pooling_note() -> str:
    return f"pooling: --method {', '.join(_pooling())}"


def _heads_class(family: FamilyRow) -> str:
    """Return the classes for GQA and MQA in one cell, in lines of their own where they differ."""
    shared, one = (_target_class(family, classes) for classes in (family.gqa, family.mqa))
    for holder in family.gqa:
        shared = shared.replace(f", with {holder.needs}", " †") if holder.needs else shared
    cell = shared if shared.removesuffix(" †") == one else f"GQA: {shared}\nMQA: {one}"
    return cell.replace(", else ", "\nor ")


def _in_lines(cell: str) -> str:
    """Return a cell whose lines fit into the columns of an 80-character terminal."""
    cell = cell.replace(" *", "*").replace(", else ", " or\n").replace("all but ", "all but\n")
    # The last part of a nested config key says enough.
    return re.sub(r"; with (?:\w+\.)*(\w+) (pooling|not \w+)", r"; \2 with\n\1", cell)


def _target_class(family: FamilyRow, holders: tuple[Holder, ...]) -> str:
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
    without = ", ".join(method.name for method in METHODS.values() if method.pool_norm is None)
    words += "".join(f"; with {key} not {without}" for key in family.normed_with)
    return words + "".join(f"; with {key} pooling" for key in family.pool_only_with)
