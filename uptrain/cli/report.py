"""`uptrain report`: its options, its call and what it prints."""

from __future__ import annotations

from pathlib import Path

import click

from uptrain.cli import console
from uptrain.cli.options import json_option
from uptrain.formatting import counted


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where the page goes; pictures go beside it. Default: "
    "DIRECTORY/report.html.",
)  # fmt: skip
@json_option
def report(directory: Path, out: Path | None, as_json: bool) -> None:
    """Show what a conversion cost and saved: one HTML file with pictures, and the pictures as PNG.

    DIRECTORY is a checkpoint that uptrain wrote, a folder of several, which are then compared, or a sweep's, which is
    shown as a table and a plot of KL against cache bytes. Of checkpoints the page has quality against cache bytes (from
    `uptrain eval`), tasks, retrieval and samples if they were measured, the energy each layer kept and how alike its
    heads were, training curves, decode speed, and the memory a request needs as MHA, GQA, MQA and MLA. It needs no
    JavaScript and asks no server for anything.

    \b
    uptrain eval demo-gqa4 --baseline demo
    uptrain report demo-gqa4
    """
    from uptrain.publishing import write_page

    done = write_page(directory, out)
    if as_json:
        names = {"page": str(done.path), "pictures": [str(path) for path in done.pictures]}
        console.result_json({**names, "missing": list(done.missing)})
        return
    if len(done.missing) == 1:
        console.note(done.missing[0])
    elif done.missing:
        parts = dict.fromkeys(sentence.partition(":")[0] for sentence in done.missing)
        console.note(f"Incomplete for lack of data: {', '.join(parts)}. The page says how to add it.")
    console.result(f"Wrote {done.path} and {counted(len(done.pictures), 'picture')} in the same folder.")
