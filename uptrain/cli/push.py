"""The command that publishes: options and help. Bodies import what they need when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from uptrain.cli import console


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create a private repository; refuses one that is public.")
@click.option("--revision", help="Branch to push to; made if there is none. Default: main.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to main.")
@click.option("--license", metavar="ID", help="The Hub's word for the licence. Default: the source's.")
@click.option("--base-model", metavar="MODEL", help="The source's Hub id, where it was converted from a folder.")
@click.option("--allow-gated-base", is_flag=True, help="Publish though the source is gated: its terms let you.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the card and the files, and upload nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def push(directory: Path, repo: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Publish DIRECTORY, a checkpoint that uptrain wrote, as OWNER/NAME on the Hub.

    Checks every file against uptrain.json and every weight for NaN, carries the licence over, and writes a model card
    from the checkpoint's history and, if there is one, eval.json: base model, method, cache before and after,
    measurements, and the commands that make it again. A README.md in DIRECTORY is used instead of the card's text,
    and its metadata comes first. All goes up in one commit; repeat the command if it is interrupted.

    The token is that of `hf auth login`, or HF_TOKEN.

    \b
    uptrain eval demo-gqa4 --baseline demo
    uptrain push demo-gqa4 me/demo-gqa4 --dry-run
    uptrain push demo-gqa4 me/demo-gqa4 --private
    """
    from uptrain.cli import push_report
    from uptrain.publishing.hub import push
    from uptrain.publishing.hub.upload import upload

    with console.bytes_progress("Checking", push_report.weight_bytes(directory)) as advance:
        prepared = push.prepare(directory, repo, dry=dry_run, on_bytes=advance, **options)
    for note in prepared.notes:
        console.note(note)
    if dry_run:
        push_report.dry_run(prepared, as_json)
        return
    push_report.pushed(prepared, upload(prepared, progress=sys.stderr.isatty()), as_json)


COMMANDS: dict[str, click.Command] = {"push": push}
"""What the command line adds, by the name it is typed under."""
