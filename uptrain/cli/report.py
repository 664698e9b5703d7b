"""`uptrain report`: its options, its call and what it prints."""

from __future__ import annotations

from pathlib import Path

import click

from uptrain.cli import console
from uptrain.cli.options import examples, json_option
from uptrain.formatting import counted


@click.command(
    epilog=examples("uptrain eval demo-gqa4 --baseline demo", "uptrain report demo-gqa4", "uptrain report demo-sweep")
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="File of the page. The charts are written to the same folder. "
    "Default: DIRECTORY/report.html.",
)  # fmt: skip
@json_option
def report(directory: Path, out: Path | None, as_json: bool) -> None:
    """Write one HTML page with charts of what a conversion cost and saved.

    The charts are also written as PNG files.

    DIRECTORY is a checkpoint that uptrain wrote, a folder of several checkpoints, or the folder of a sweep. Several
    checkpoints are compared; a sweep becomes a table and a plot of KL against cache bytes.

    The page shows quality against cache bytes, tasks, retrieval and samples (from `uptrain eval`), the explained
    energy and the head similarity per layer, training curves, decode speed, and the memory of one request with MHA,
    GQA, MQA and MLA. It needs no JavaScript and no server.
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
