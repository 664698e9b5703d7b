"""Lay out what a push would send or has sent; printing itself is the console's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.cli import console
from uptrain.formatting import typed

if TYPE_CHECKING:
    from uptrain.publishing.hub.upload import Prepared, Pushed


def weight_bytes(directory: Path) -> int:
    """Return the bytes of a folder's weight files, which checking reads through."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def dry_run(prepared: Prepared, as_json: bool) -> None:
    """Show the card and the files of a push that isn't made."""
    if as_json:
        console.result_json({"repo": prepared.repo, **_facts(prepared), "card": prepared.card})
        return
    console.result(prepared.card)
    console.facts(
        f"{prepared.directory} → {prepared.repo} (dry run: nothing is uploaded)",
        [(name, console.size(size)) for name, size in prepared.files.items()],
    )


def pushed(prepared: Prepared, done: Pushed, as_json: bool) -> None:
    """Show a finished push."""
    if as_json:
        result = {"repo": done.repo, "url": done.url, "commit": done.commit, "pull_request": done.pull_request}
        console.result_json({**result, "removed": list(done.removed), **_facts(prepared)})
        return
    pairs = [
        ("files", f"{len(prepared.files)}, {console.size(sum(prepared.files.values()))}"),
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
