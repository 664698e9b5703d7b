"""`uptrain push`: its options, its call, and what it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uptrain.cli import console
from uptrain.cli.options import json_option
from uptrain.formatting import size, typed

if TYPE_CHECKING:
    from uptrain.publishing.hub.upload import Prepared, Pushed


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
@json_option
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
    from uptrain.publishing.hub.prepare import PushSettings, prepare
    from uptrain.publishing.hub.upload import upload

    with console.bytes_progress("Checking", _weight_bytes(directory)) as advance:
        prepared = prepare(directory, repo, PushSettings(**options, dry_run=dry_run), advance)
    for note in prepared.notes:
        console.note(note)
    if dry_run:
        _show_plan(prepared, as_json)
        return
    _show(prepared, upload(prepared, progress=sys.stderr.isatty()), as_json)


def _weight_bytes(directory: Path) -> int:
    """Return the bytes of a folder's weight files, which checking reads through."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _show_plan(prepared: Prepared, as_json: bool) -> None:
    """Show the card and the files of a push that isn't made."""
    if as_json:
        console.result_json({"repo": prepared.repo, **_facts(prepared), "card": prepared.card})
        return
    console.result(prepared.card)
    console.facts(
        f"{prepared.directory} → {prepared.repo} (dry run: nothing is uploaded)",
        [(name, size(count)) for name, count in prepared.files.items()],
    )


def _show(prepared: Prepared, done: Pushed, as_json: bool) -> None:
    """Show a finished push."""
    if as_json:
        result = {"repo": done.repo, "url": done.url, "commit": done.commit, "pull_request": done.pull_request}
        console.result_json({**result, "removed": list(done.removed), **_facts(prepared)})
        return
    pairs = [
        ("files", f"{len(prepared.files)}, {size(sum(prepared.files.values()))}"),
        ("commit", done.commit),
    ]
    if done.removed:
        pairs.append(("removed", f"{', '.join(done.removed)}, of an older push"))
    if done.pull_request:
        pairs.append(("pull request", done.pull_request))
    console.facts(f"Pushed {prepared.directory} to {done.url}", pairs)
    console.note(f"Next: uptrain inspect {typed(done.repo)}")


def _facts(prepared: Prepared) -> dict[str, object]:
    return {
        "private": prepared.private,
        "revision": prepared.revision,
        "create_pr": prepared.create_pr,
        "files": prepared.files,
        "notes": list(prepared.notes),
    }
