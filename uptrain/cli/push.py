"""`uptrain push`: its options, its call, and what it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uptrain.cli import console
from uptrain.cli.options import examples, json_option
from uptrain.formatting import size, typed

if TYPE_CHECKING:
    from uptrain.publishing.hub.upload import Prepared, Pushed


@click.command(
    epilog=examples(
        "uptrain eval demo-gqa4 --baseline demo",
        "uptrain push demo-gqa4 me/demo-gqa4 --dry-run",
        "uptrain push demo-gqa4 me/demo-gqa4 --private",
    )
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create a private repository. A public one is refused.")
@click.option("--revision", help="Branch to push to. It is created if it does not exist. Default: main.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to main.")
@click.option("--license", metavar="ID", help="The Hub's identifier of the licence. Default: that of the source.")
@click.option("--base-model", metavar="MODEL", help="Hub id of the source, if a folder was converted.")
@click.option("--allow-gated-base", is_flag=True, help="Publish although the source is gated, if its terms allow it.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the card and the files, and upload nothing.")
@json_option
def push(directory: Path, repo: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Publish DIRECTORY on the Hugging Face Hub as OWNER/NAME.

    DIRECTORY is a checkpoint that uptrain wrote. push compares every file with uptrain.json, checks every weight for
    NaN, finds the licence of the source, and writes a model card: base model, method, cache before and after,
    measurements of eval.json, and the commands that reproduce the checkpoint. If DIRECTORY has a README.md, its text
    replaces that of the card, and its metadata takes precedence.

    Everything is uploaded in one commit. To continue an interrupted upload, repeat the command.

    The token is that of `hf auth login`, or HF_TOKEN.
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
    """Return the bytes of a folder's weight files, all of which are checked."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _show_plan(prepared: Prepared, as_json: bool) -> None:
    """Print the card and the files of a push that is not made."""
    if as_json:
        console.result_json({"repo": prepared.repo, **_facts(prepared), "card": prepared.card})
        return
    console.result(prepared.card)
    console.facts(
        f"{prepared.directory} → {prepared.repo} (dry run: nothing is uploaded)",
        [(name, size(count)) for name, count in prepared.files.items()],
    )


def _show(prepared: Prepared, done: Pushed, as_json: bool) -> None:
    """Print a finished push."""
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
